-- Line: the workers that wait, by virtual time; who is next, and what it gets.
--
-- Start-time fair queueing: a worker's tag is the virtual time at which it may be served; each time that it is,
-- the tag moves by the work that it got, divided by the number of its callers that wait. A record says of a worker
-- how many slots it holds (`held`), its `tag` and `weight`, what its first call costs (`need`; nil if none waits),
-- what that waits for (`bound`), `since` when the worker waits and since when it has been first (`first`,
-- 0: others come first), and when it is `due` to ask again. The rules are those of asyncbucket/stores/store.py; state.py follows them, too.

local EXCEEDS = -1 -- instead of a start: such a call can never pass

-- How much work (us of the limit that binds most) a call is.
local function work_of(s, call)
  local work = 0
  for resource, each in pairs(s.config.work) do
    work = math.max(work, (call[resource] or 0) * each)
  end
  return work > 0 and work or UNPRICED
end

-- The first instant from now and the last start on that suits all limits, and the resource that binds.
-- A call above a burst earns what is above it while it is first in line: `since` when, if not since now.
local function earliest(s, call, since)
  local when, bound = math.max(s.now, s.last), ''
  if when > s.now then -- those who came first are held up by it
    bound = s.bound
  end
  local earned_since = since and since > 0 and since or when
  for _, m in ipairs(s.meters) do
    local amount = call[m.resource] or 0
    if amount > 0 then
      local first = window_earliest(m.window, amount, earned_since)
      if m.bucket then
        first = math.max(first, bucket_earliest(m.bucket, amount, earned_since))
      end
      if first > when then
        when, bound = first, m.resource
      end
    end
  end
  if s.paused > when then
    return s.paused, 'paused'
  end
  return when, bound
end

local function new_record()
  return { held = 0, tag = 0, weight = 0, due = 0, first = 0, since = 0 }
end

local function record_of(s, worker)
  local r = s.records[worker]
  if not r then
    local kept = redis.call('HGET', KEYS[1], 'w:' .. worker)
    r = kept and cmsgpack.unpack(kept) or new_record()
    s.records[worker] = r
  end
  return r
end

local function is_full(r)
  return r.bound == SLOT
end

-- Change how many slots a worker holds, what its first call costs and waits for, and with what weight.
local function change(s, worker, held, need, weight, bound)
  local r = record_of(s, worker)
  local function claims()
    return (r.held > 0 or r.need) and 1 or 0
  end
  s.claims, s.lent, s.weights = s.claims - claims(), s.lent + held - r.held, s.weights + weight - r.weight
  s.short = s.short + (bound == SLOT and 1 or 0) - (is_full(r) and 1 or 0)
  r.since = r.need and r.since or s.now
  r.held, r.need, r.weight, r.bound = held, need, weight, bound
  s.claims = s.claims + claims()
  if not need then
    r.first = 0
    redis.call('ZREM', KEYS[3], worker)
  end
  s.changed[worker] = true
  return r
end

local function forget(s, worker)
  change(s, worker, 0, nil, 0, nil)
  s.records[worker], s.changed[worker], s.removed[worker] = new_record(), nil, true
end

-- Forget those that gave no sign of life in time; a worker that gives one now lives for `ttl` more. The first write
-- of a batch is one that a server short of memory refuses.
local function expire(s, worker, ttl)
  local dead = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(s.now))
  if worker then
    redis.call('ZADD', KEYS[2], as_integer(s.now + ttl), worker)
  end
  for _, worker in ipairs(dead) do
    forget(s, worker)
  end
end

local function free_slots(s)
  return s.config.concurrency and s.config.concurrency - s.lent or math.huge
end

-- How many slots a worker may hold while another waits for one.
local function share_of(s)
  return s.config.concurrency and math.ceil(s.config.concurrency / math.max(1, s.claims)) or math.huge
end

-- Who waits before a worker and is not late; those who are more than late leave the line. Nobody does who waits for
-- one of the slots that the worker has just given back (`gave`), and holds as many: a slot that changes hands costs a trip.
local function first_before(s, me, tag, gave)
  local held, share = record_of(s, me).held, share_of(s)
  local found = redis.call('ZRANGE', KEYS[3], 0, AHEAD, 'WITHSCORES')
  for i = 1, #found, 2 do
    local worker, its_tag = found[i], tonumber(found[i + 1])
    if worker == me or its_tag > tag then
      return nil
    end
    local r = record_of(s, worker)
    if r.due < s.now - GRACE then
      change(s, worker, r.held, nil, 0, nil)
    elseif r.due >= s.now - LATE and not (is_full(r) and r.held >= share) then
      if not (gave and is_full(r) and r.held >= held and s.now < r.since + r.held * HANDOVER) then
        return worker
      end
    end
  end
  return nil
end

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
  s.last, s.bound = when, when > s.now and bound or ''
  local ramp = s.ramp
  if ramp then -- a slow start: the n-th call may pass log2(n) steps after the pause
    ramp.calls = ramp.calls + 1
    s.paused = ramp.start + math.ceil(ramp.step * math.log(ramp.calls) / math.log(2))
    if ramp.calls >= SLOW_CALLS then
      s.ramp = nil
    end
  end
end

-- Book the next call of a worker; return its start, or nil, and what binds it.
local function answer(s, a, call)
  local me = a.me
  local full = (call[SLOT] or 0) > 0 and (free_slots(s) <= 0 or (a.rivals > 0 and me.held >= share_of(s)))
  local when, bound = earliest(s, call, a.work == 0 and me.first or 0)
  if full then
    return nil, SLOT
  elseif a.first then
    return nil, bound ~= '' and bound or record_of(s, a.first).bound
  elseif a.work == 0 and when > s.now + FAR then
    a.ask = when - FAR
    return nil, bound
  elseif a.work > 0 and (when > a.latest or (a.others > 0 and a.work >= a.turn)) then
    a.ask = math.max(s.now, s.last - (a.others > 0 and FAR or TURN))
    return nil, bound
  end
  a.latest = a.latest or when + a.turn
  book(s, call, when, bound)
  a.work = a.work + work_of(s, call)
  if (call[SLOT] or 0) > 0 then
    change(s, a.worker, me.held + 1, me.need, me.weight, me.bound)
  end
  return when - s.now, bound
end

-- Say when a worker asks again whose first call could not be booked; those before it have been called.
local function wait(s, a, call)
  local me = a.me
  if is_full(me) or a.first or a.work > 0 then
    me.first = 0
  elseif me.first == 0 then
    me.first = math.max(s.now, s.last)
  end
  local rank = redis.call('ZRANK', KEYS[3], a.worker)
  if is_full(me) then
    a.ask = s.now + math.max(1, rank) * STEP
  elseif a.first or rank > 0 then
    local head = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
    local ahead = record_of(s, a.first or head[1])
    local base = math.max(s.now, s.last - FAR, is_full(ahead) and s.now or ahead.due)
    a.ask = base + math.floor(SPARE * math.max(rank * s.slice, (me.tag - head[2]) * s.weights / 1000))
  end
  me.due = a.ask
  a.soonest = math.max(s.now, s.last, s.paused)
  if s.lent == 0 then -- else those who hold a slot may give all back
    a.soonest = earliest(s, call, me.first)
  end
end

-- Tell those whose turn has come, and do not know it yet: as many as there are free slots, or the first.
local function tell(s)
  if redis.call('ZCARD', KEYS[3]) == 0 then
    return
  end
  local free, share = free_slots(s), share_of(s)
  local found = redis.call('ZRANGE', KEYS[3], 0, math.min(AHEAD, math.max(0, free)))
  for _, worker in ipairs(found) do
    local r = record_of(s, worker)
    if r.due >= s.now - LATE and not (is_full(r) and (free <= 0 or (r.held >= share and s.short > 1))) then
      local come = is_full(r) and s.now or math.max(s.now, earliest(s, r.need, r.first) - FAR)
      if come < r.due - SOON then
        r.due, s.changed[worker] = come, true
        redis.call('PUBLISH', channel .. worker, as_integer(come - s.now))
      end
      if not is_full(r) then
        return
      end
      free = free - 1
    end
  end
end

-- Book the calls of `asks`, in order, each group a count and a cost; the first that has to wait stops those behind.
-- The answers are groups, too: a count, and the start as an offset from now, or EXCEEDS.
local function admit(s, worker, asks, weight, gave)
  local me = record_of(s, worker)
  if me.need then
    me.due = s.now -- whenever it comes, it stands where it stood
  else
    s.joined = math.max(s.joined + 1, s.virtual) -- in order of arrival
    me.tag = math.max(me.tag, s.joined)
  end
  local a = { worker = worker, me = me, answers = {}, work = 0, ask = 0, soonest = 0, bound = '' }
  a.first = #asks > 0 and first_before(s, worker, me.tag, gave > 0) or nil
  a.others = redis.call('ZCARD', KEYS[3]) - (me.need and 1 or 0)
  a.turn = math.min(TURN, math.max(SHORT_TURN, math.floor(ROUND / (a.others + 1))))
  a.rivals = s.short - (is_full(me) and 1 or 0)
  local stop = nil
  for _, group in ipairs(asks) do
    local count, call = group[1], group[2]
    local exceeds = exceeded(s, call)
    while count > 0 and not stop do
      local offset, bound, n = EXCEEDS, exceeds, count
      if not exceeds then
        offset, bound = answer(s, a, call)
        n = 1
      end
      if not offset then
        stop, a.bound = call, bound
        break
      end
      for _, each in ipairs({ as_integer(n), as_integer(offset), cjson.encode(bound) }) do
        a.answers[#a.answers + 1] = each
      end
      count = count - n
    end
  end
  if a.work > 0 then
    me.since = s.now
    local weights = s.weights - me.weight + weight
    s.virtual = math.max(s.virtual, me.tag) + math.floor(a.work * 1000 / weights)
    me.tag = me.tag + math.floor(a.work * 1000 / weight)
    s.slice = math.floor((s.slice * 7 + a.work) / 8)
  end
  change(s, worker, me.held, stop, stop and weight or 0, stop and a.bound or nil)
  if stop then
    redis.call('ZADD', KEYS[3], as_integer(me.tag), worker)
  end
  me.due = s.now
  tell(s)
  if stop then
    wait(s, a, stop)
  end
  return a
end
