-- Admission: which calls of a batch are booked, and what the others wait for.

local NOT_BOOKED = { full = -1, later = -2, never = -3 }

-- The resource of which the call wants more than ever passes, or nil.
local function exceeded(s, call)
  for _, m in ipairs(s.meters) do
    if (call[m.resource] or 0) > m.window.amount then
      return m.resource
    end
  end
  return nil
end

local function book(s, call, when, bound)
  for _, m in ipairs(s.meters) do
    local amount = call[m.resource] or 0
    if amount > 0 then
      window_book(m.window, amount, when)
      if m.bucket then
        bucket_book(m.bucket, amount, when)
      end
    end
  end
  s.last, s.bound = when, bound
  local ramp = s.ramp
  if ramp then -- a slow start: the n-th call may pass log2(n) steps after the pause
    ramp.calls = ramp.calls + 1
    s.paused = ramp.start + math.ceil(ramp.step * math.log(ramp.calls) / math.log(2))
    if ramp.calls >= 256 then
      s.ramp = nil
    end
  end
end

-- For each correction its start, and what was booked and used of each resource.
local function correct(s, corrections)
  local date = math.max(s.now, s.last)
  for _, correction in ipairs(corrections) do
    local start, was_booked, was_used = unpack(correction)
    for _, m in ipairs(s.meters) do
      local used = was_used[m.resource] or 0
      local more = used - (was_booked[m.resource] or 0)
      if more > 0 then
        owe(m, more, date)
      elseif more < 0 then
        window_unbook(m.window, -more, start)
        if m.bucket then
          bucket_unbook(m.bucket, -more, start, used)
        end
      end
    end
  end
end

local function is_same(s, place, call)
  for _, m in ipairs(s.meters) do
    if (place.call[m.resource] or 0) ~= (call[m.resource] or 0) then
      return false
    end
  end
  return true
end

-- Find who comes before the next call of a worker: how many slots are kept for them, and who waits for units.
local function look_ahead(s, a)
  local kept = 0
  for _, place in ipairs(in_order(s, a.line, a.share)) do
    if place == a.me then
      break
    elseif a.gave > 0 and place.held >= a.held and s.now < place.since + place.held * ROUND then
      a.passed = true
    elseif is_full(place) then
      kept = kept + reserved(place, a.share)
    else
      a.first = a.first or place
    end
  end
  return kept
end

-- Book one call; return its start, or one of NOT_BOOKED, and what binds it.
local function answer(s, a, call, horizon)
  local place = a.place
  local slot = (call[SLOT] or 0) > 0
  local kept = look_ahead(s, a)
  if slot and free_slots(s) <= kept then
    return NOT_BOOKED.full, SLOT
  end
  local since = a.booked == 0 and place and is_same(s, place, call) and place.first or nil
  local when, bound = earliest(s, call, since)
  if a.booked > 0 then
    if when > a.latest_start then
      a.ask = math.max(s.now, s.last - horizon)
      return NOT_BOOKED.later, bound
    end
  elseif a.first then
    return NOT_BOOKED.later, bound ~= '' and bound or a.first.bound
  elseif when > s.now + FAR then
    a.ask = when - FAR
    return NOT_BOOKED.later, bound
  else
    a.latest_start = when + horizon
  end
  book(s, call, when, when > s.now and bound or '')
  a.booked = a.booked + 1
  if slot then
    a.held, a.gave = a.held + 1, a.gave - 1
    a.me.held = a.held
    s.total = s.total + 1
    s.holders = s.holders + (a.held == 1 and 1 or 0)
  end
  return when - s.now, bound
end

-- Leave the line, or stand in it: where it stood, or at the end if it was served.
local function settle_place(s, a, call, wanted, bound, next_expiry)
  local place, full = a.place, a.stopped == NOT_BOOKED.full
  local stays = a.stopped and (full or a.booked == 0 or #s.line > (place and 1 or 0))
  if place and not (stays and (a.passed or a.booked == 0)) then
    line_leave(s, a.worker)
    place = nil
  end
  if not stays then
    return
  end
  local is_known = place and is_same(s, place, call)
  if not place then
    place = { worker = a.worker, since = s.now, first = 0 }
    table.insert(s.line, place)
  end
  place.call = call
  place.bound, place.wanted, place.held, place.due = bound, wanted, a.held, s.now
  if not full and not a.first and a.booked == 0 then
    if place.first == 0 or not is_known then
      place.first = math.max(s.now, s.last)
    end
  else
    place.first = 0
    local order = in_order(s, s.line, a.share)
    if order[1] == place then -- a slot may expire
      a.ask = next_expiry(s)
    end
    for i = 2, #order do
      if order[i] == place then -- the first may be dead
        local come = is_full(order[1]) and s.now or math.max(s.now, order[1].due)
        a.ask = come + (i - 1) * STEP
      end
    end
  end
  place.due = a.ask
  a.soonest = math.max(s.now, s.last, s.paused)
  if s.total == 0 then -- else those who hold a slot may give all back
    a.soonest = earliest(s, call, place.first)
  end
end

-- Book `calls`, for each the amount of every resource and its slots; see Ledger.commit. The first
-- that has to wait stops those behind it.
local function admit(s, worker, calls, horizon, held, gave, next_expiry)
  local place = place_of(s, worker)
  local line, me = s.line, place
  if place then -- whenever it comes, it stands where it stood
    place.due = s.now
  else
    me = { worker = worker, held = held, due = s.now }
    line = { unpack(s.line) }
    table.insert(line, me)
  end
  local a = {
    worker = worker, place = place, me = me, line = line, held = held, gave = gave,
    share = share_of(s, worker, held), booked = 0, latest_start = 0, ask = 0, soonest = 0, answers = {},
  }
  local wanted, stopped_call, stop_bound = 0, nil, ''
  for _, call in ipairs(calls) do
    local offset, bound = a.stopped, stop_bound
    local exceeded_resource = exceeded(s, call)
    if exceeded_resource then
      offset, bound = NOT_BOOKED.never, exceeded_resource
    else
      if not offset then
        offset, bound = answer(s, a, call, horizon)
        if offset < 0 then
          a.stopped, stopped_call, stop_bound = offset, call, bound
        end
      end
      if offset < 0 then
        wanted = wanted + (call[SLOT] or 0)
      end
    end
    a.answers[#a.answers + 1] = as_integer(offset)
    a.answers[#a.answers + 1] = cjson.encode(bound)
  end
  settle_place(s, a, stopped_call, wanted, stop_bound, next_expiry)
  return a
end

-- Verbs: what a worker may ask. Every script is this one; ARGV[1] says which.

local function reply(s, fields)
  local parts = { '"now":' .. as_integer(s.now), '"epoch":"' .. s.epoch .. '"' }
  for name, value in pairs(fields) do
    parts[#parts + 1] = '"' .. name .. '":' .. value
  end
  return '{' .. table.concat(parts, ',') .. '}'
end

-- What the windows have left, or less, for whoever must go on alone: booking makes them forget.
local function left(s)
  local units = {}
  for i, m in ipairs(s.meters) do
    units[i] = as_integer(m.window.amount - m.window.used)
  end
  return '[' .. table.concat(units, ',') .. ']'
end

-- What a worker says about itself comes first in ARGV, behind the verb.
local worker, known_epoch, new_epoch, config, channel, ttl = unpack(ARGV, 2, 7)
ttl = tonumber(ttl)

local verbs = {}

function verbs.commit(seq, horizon, held, corrections, calls, sets_config, pause, step, starts)
  seq, horizon, held = tonumber(seq), tonumber(horizon), tonumber(held)
  if sets_config == '1' then
    redis.call('PUBLISH', channel .. worker, '-1') -- tells nobody, but is refused whom ACLs forbid to tell
  end
  local s = load(known_epoch, new_epoch, config, ttl, starts)
  local is_new = sets_config == '1' and configure(s, config)
  if s.text ~= config then
    return reply(s, { config = s.text })
  end
  for _, m in ipairs(s.meters) do
    if m.window.resets ~= '' and not window_knows(m.window, s.now - s.offset) then
      return '{"wall":' .. as_integer(s.now - s.offset) .. '}'
    end
  end
  local answered = redis.call('HGET', KEYS[1], 'r:' .. worker)
  if answered then
    local last, text = answered:match('^(%d+) (.*)$')
    if tonumber(last) == seq then
      return text
    end
  end
  expire(s)
  local till = s.now + tonumber(pause)
  if till > s.now and till > s.paused then
    s.paused, s.ramp = till, nil
    if tonumber(step) > 0 then
      s.ramp = { start = till, step = tonumber(step), calls = 1 }
    end
  end
  correct(s, cjson.decode(corrections))
  local before = set_held(s, worker, held)
  local own = place_of(s, worker)
  if own then
    own.held = held
  end
  local a = { answers = {}, ask = 0, soonest = 0, held = held }
  if calls ~= 'same' then
    a = admit(s, worker, cjson.decode(calls), horizon, held, before - held, function()
      local others = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. as_integer(s.now), '+inf', 'WITHSCORES', 'LIMIT', 0, 2)
      return tonumber(others[1] ~= worker and others[2] or others[4]) or s.now + ttl
    end)
  end
  own = place_of(s, worker)
  for _, m in ipairs(s.meters) do -- perhaps nobody has booked anything for long
    window_forget(m.window, s.now)
  end
  local notices = call(s)
  local crowded = s.config.concurrency and 2 * free_slots(s) < s.config.concurrency or false
  for _, place in ipairs(s.line) do
    crowded = crowded or (place ~= own and is_full(place))
  end
  save(s)
  save_workers(s, worker, a.held, ttl)
  local text = reply(s, {
    ask = as_integer(a.ask),
    soonest = as_integer(a.soonest),
    left = left(s),
    workers = redis.call('ZCARD', KEYS[2]),
    crowded = tostring(crowded),
    inline = tostring(own ~= nil),
    bookings = '[' .. table.concat(a.answers, ',') .. ']',
  })
  redis.call('HSET', KEYS[1], 'r:' .. worker, as_integer(seq) .. ' ' .. text)
  if is_new then
    redis.call('PUBLISH', channel .. '*', '0')
  end
  notify(channel, notices)
  return text
end

-- Writes nothing.
function verbs.peek()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('', new_epoch, config, ttl)
  expire(s)
  local uses, date = {}, math.max(s.now, s.last) -- nothing more starts before
  for i, m in ipairs(s.meters) do
    local available = window_available(m.window, date)
    if m.bucket then
      available = math.min(available, bucket_available(m.bucket, date))
    end
    if date > s.now then
      available = math.min(0, available)
    end
    uses[i] = as_integer(m.window.used) .. ',' .. as_integer(available)
  end
  return reply(s, {
    config = s.text,
    uses = '[' .. table.concat(uses, ',') .. ']',
    slots = as_integer(s.config.concurrency and s.total or 0),
    paused = as_integer(s.paused),
    last = as_integer(s.last),
    workers = #redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. as_integer(s.now), '+inf'),
  })
end

function verbs.leave()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('', new_epoch, config, ttl)
  expire(s)
  forget(s, worker)
  local notices = call(s)
  save(s)
  save_workers(s)
  notify(channel, notices)
  return '{}'
end

return verbs[ARGV[1]](unpack(ARGV, 8))
