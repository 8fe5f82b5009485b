-- Admission: which calls of a batch are booked, and what the others wait for.

local NOT_BOOKED = { full = -1, later = -2, never = -3 }
local PATIENCE = 1000000

-- The resource of which the call wants more than ever passes, or nil.
local function exceeded(s, amounts, at)
  for _, m in ipairs(s.meters) do
    if amounts[at + m.resource] > m.window.amount then
      return m.resource
    end
  end
  return nil
end

local function book(s, amounts, at, when)
  for _, m in ipairs(s.meters) do
    local amount = amounts[at + m.resource]
    if amount > 0 then
      window_book(m.window, amount, when)
      if m.bucket then
        bucket_book(m.bucket, amount, when)
      end
    end
  end
  s.last = when
  local ramp = s.ramp
  if ramp then -- a slow start: the n-th call may pass log2(n) steps after the pause
    ramp.calls = ramp.calls + 1
    s.paused = ramp.start + math.ceil(ramp.step * math.log(ramp.calls) / math.log(2))
    if ramp.calls >= 256 then
      s.ramp = nil
    end
  end
end

-- `corrections`: flat, for each its start and then booked and used of every resource.
local function correct(s, corrections)
  local n = s.config.resources
  local date = math.max(s.now, s.last)
  for at = 1, #corrections, 1 + 2 * n do
    local start = corrections[at]
    for _, m in ipairs(s.meters) do
      local used = corrections[at + n + m.resource]
      local more = used - corrections[at + m.resource]
      if more > 0 then
        window_book(m.window, more, date)
        if m.bucket then
          bucket_owe(m.bucket, more, date)
        end
      elseif more < 0 then
        window_unbook(m.window, -more, start)
        if m.bucket then
          bucket_unbook(m.bucket, -more, start, used)
        end
      end
    end
  end
  return date
end

-- Book `calls`, flat, for each the amount of every resource and its slots; see Ledger.commit. The
-- first that has to wait stops those behind it; return what it waits for: nil, or one of NOT_BOOKED.
local function admit(s, worker, seq, calls, horizon, held)
  local n, size = s.config.resources, s.config.concurrency
  local a = { answers = {}, slots = {}, starts = {}, ask = 0, free = 0 }
  local ahead, waited, wanted, latest_start, stop_bound = 0, 0, 0, nil, 0
  turns_prune(s, worker)
  local turn = turns_of(s, worker)
  if size then
    a.free = size - slots_used(s)
    line_prune(s, worker)
    ahead, waited = line_leave(s, worker)
  end
  for at = 0, #calls - 1, n + 1 do
    local answer, bound = a.stopped, stop_bound
    local slot = size and calls[at + n + 1] > 0
    local exceeded_resource = exceeded(s, calls, at)
    if exceeded_resource then
      answer, bound = NOT_BOOKED.never, exceeded_resource
    elseif not answer and slot and not line_allows(s, a.free, ahead, held, seq) then
      answer, bound = NOT_BOOKED.full, n + 1
      turns_leave(s, worker)
    elseif not answer then
      local since = not latest_start and turns_since(s, worker, calls, at) or nil
      local when
      when, bound = earliest(s, calls, at, since)
      if bound == 0 and when > s.now then -- those who came first are held up by it
        bound = s.bound
      end
      local ask = not latest_start and turns_wait(s, worker, when)
      latest_start = latest_start or when + horizon
      if ask then
        answer, a.ask = NOT_BOOKED.later, ask
        turns_enter(s, worker, ask, { unpack(calls, at + 1, at + n) }, bound, since)
      elseif when > latest_start then
        answer, a.ask = NOT_BOOKED.later, math.max(s.now, s.last - horizon)
      else
        book(s, calls, at, when)
        s.bound = when > s.now and bound or 0
        if bound == 0 then -- it may start at once, but perhaps it has waited
          bound = (slot and at / (n + 1) < waited) and n + 1 or turn and turn.bound or 0
        end
        turns_leave(s, worker)
        turn = nil
        if slot then
          a.starts[#a.starts + 1] = when
          a.slots[#a.slots + 1] = worker .. ':' .. as_integer(seq) .. ':' .. at / (n + 1)
          a.free, held, ahead = a.free - 1, held + 1, #s.line
        end
        a.answers[#a.answers + 1] = as_integer(when - s.now)
      end
    end
    if answer then
      a.answers[#a.answers + 1] = as_integer(answer)
      if answer ~= NOT_BOOKED.never then
        a.stopped, stop_bound = answer, bound
        wanted = wanted + 1
      end
    end
    a.answers[#a.answers + 1] = as_integer(bound)
  end
  if a.stopped == NOT_BOOKED.full then
    line_enter(s, worker, ahead, held, wanted)
  elseif #calls == 0 then
    turns_leave(s, worker)
  end
  return a
end

-- When a worker that waits for a slot should look again though nobody calls it: when one would expire,
-- or those ahead in line may have been called in vain.
local function ask_again(s, fresh_slots_end)
  local at = #s.line > 1 and s.now + PATIENCE or fresh_slots_end
  local now = '(' .. as_integer(s.now)
  local first = redis.call('ZRANGEBYSCORE', KEYS[2], now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  return math.min(at, tonumber(first[2]) or at)
end
