-- Line: the workers that wait, by virtual time; who is next, and what it gets. The rules are those of
-- asyncbucket/stores/store.py; state.py follows them, too.
--
-- A record says of a worker how many slots it holds (`held`), its `tag` and `weight`, what its first call costs (`need`; nil if
-- none waits), what that waits for (`bound`), since when it has been first (`first`; 0: others come first),
-- and when it is `due` to ask again.

local EXCEEDS = -1 -- instead of a start: such a call can never pass

-- How much work (us of the limit that binds most) a call is.
local function work_of(call)
  local work = 0
  for resource, each in pairs(config.work) do
    work = math.max(work, (call[resource] or 0) * each)
  end
  return work > 0 and work or UNPRICED
end

-- The first instant from now and the last start on that suits all limits, and the resource that binds.
local function earliest(call, since)
  local when = math.max(now, s.last)
  local bound = when > now and s.bound or '' -- those who came first are held up by it
  local earned_since = since > 0 and since or when
  for _, m in ipairs(config.meters) do
    local amount = call[m.resource] or 0
    local first = amount > 0 and meter_earliest(m, amount, earned_since) or 0
    if first > when then
      when, bound = first, m.resource
    end
  end
  if s.paused > when then
    return s.paused, 'paused'
  end
  return when, bound
end

local function new_record()
  return { held = 0, tag = 0, weight = 0, due = 0, first = 0 }
end

local function record_of(name)
  local r = records[name]
  if not r then
    local kept = redis.call('HGET', KEYS[1], 'w:' .. name)
    r = kept and cmsgpack.unpack(kept) or new_record()
    records[name] = r
  end
  return r
end

-- Change how many slots a worker holds, and what its first call costs and waits for, and for how many callers.
local function change(name, held, need, bound, weight)
  local r = record_of(name)
  weight = need and weight or 0
  s.lent, s.weights = s.lent + held - r.held, s.weights + weight - r.weight
  s.claims = s.claims + ((held > 0 or need) and 1 or 0) - ((r.held > 0 or r.need) and 1 or 0)
  s.short = s.short + (bound == SLOT and 1 or 0) - (r.bound == SLOT and 1 or 0)
  r.held, r.need, r.bound, r.weight, changed['w:' .. name] = held, need, bound, weight, r
  if need then
    redis.call('ZADD', KEYS[3], as_integer(r.tag), name)
  else
    r.first = 0
    redis.call('ZREM', KEYS[3], name)
  end
end

local function forget(name)
  change(name, 0)
  gone[#gone + 1] = 'w:' .. name
  records[name], changed['w:' .. name] = new_record(), nil
end

-- Forget those that gave no sign of life in time; `alive` gives one now.
local function expire(alive)
  local dead = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(now))
  if alive then
    redis.call('ZADD', KEYS[2], as_integer(now + ttl), alive)
  end
  for _, name in ipairs(dead) do
    forget(name)
    if name ~= alive then
      redis.call('ZREM', KEYS[2], name)
    end
  end
end

local function free_slots()
  return config.concurrency and config.concurrency - s.lent or math.huge
end

-- How many slots a worker may hold while another waits for one.
local function share_of()
  return config.concurrency and math.ceil(config.concurrency / math.max(1, s.claims)) or math.huge
end

-- Those whose turn is next; who is late leaves the line.
local function heads()
  local found = {}
  for _, name in ipairs(redis.call('ZRANGE', KEYS[3], 0, AHEAD)) do
    local r = record_of(name)
    if r.due < now - LATE then
      change(name, r.held)
    else
      found[#found + 1] = name
    end
  end
  return found
end

-- Tell those whose turn has come, and do not know it yet: as many as there are free slots, or the first.
local function tell()
  local free = free_slots()
  for _, name in ipairs(heads()) do
    local r = record_of(name)
    if r.bound ~= SLOT or (free > 0 and (r.held < share_of() or s.short == 1)) then
      local come = r.bound == SLOT and now or math.max(now, earliest(r.need, r.first) - FAR)
      if come < r.due - SOON then
        r.due, changed['w:' .. name] = come, r
        redis.call('PUBLISH', r.channel, as_integer(come - now) .. ' ' .. name)
      end
      if r.bound ~= SLOT then
        return
      end
      free = free - 1
    end
  end
end

local function book(call, when, bound)
  for _, m in ipairs(config.meters) do
    local amount = call[m.resource] or 0
    if amount > 0 then
      meter_book(m, amount, when)
    end
  end
  s.last, s.bound = when, when > now and bound or ''
end

-- Book the next call of a worker; return its start, or nil, and what binds it.
local function answer(a, me, call)
  local when, bound = earliest(call, a.work == 0 and me.first or 0)
  if (call[SLOT] or 0) > 0 and (free_slots() <= 0 or (a.is_contended and me.held >= share_of())) then
    return nil, SLOT
  elseif a.first then
    return nil, bound ~= '' and bound or record_of(a.first).bound
  elseif a.work == 0 and when > now + FAR then
    a.ask = when - FAR
    return nil, bound
  elseif a.work > 0 and (when > a.latest or (a.others > 0 and a.work >= TURN)) then
    a.ask = math.max(now, s.last - (a.others > 0 and FAR or TURN))
    return nil, bound
  end
  a.latest = a.latest or when + TURN
  book(call, when, bound)
  a.work = a.work + work_of(call)
  if (call[SLOT] or 0) > 0 then
    change(worker, me.held + 1, me.need, me.bound, me.weight)
  end
  return when - now, bound
end

-- Say when a worker asks again whose first call could not be booked; those before it have been called.
local function wait(a, me, call)
  if me.bound == SLOT or a.first or a.work > 0 then
    me.first = 0
  elseif me.first == 0 then
    me.first = math.max(now, s.last)
  end
  local rank = redis.call('ZRANK', KEYS[3], worker)
  if rank > 0 then
    a.ask = math.max(now, record_of(redis.call('ZRANGE', KEYS[3], 0, 0)[1]).due) + rank * STEP
  elseif me.bound == SLOT then
    a.ask = now + STEP
  end
  me.due, a.soonest = a.ask, math.max(now, s.last, s.paused)
  if s.lent == 0 then -- else those who hold a slot may give all back
    a.soonest = earliest(call, me.first)
  end
end

-- Book `calls`, in order; the first that has to wait stops those behind.
local function admit(calls, weight)
  local me = record_of(worker)
  if me.need then
    me.due = now -- whenever it comes, it stands where it stood
  else
    s.joined = math.max(s.joined + 1, s.virtual) -- in order of arrival
    me.tag = math.max(me.tag, s.joined)
  end
  local a, stop = { answers = {}, work = 0, ask = 0, soonest = 0, bound = '' }, nil
  for _, name in ipairs(#calls > 0 and heads() or {}) do
    local r = record_of(name)
    if name == worker or r.tag > me.tag then
      break
    elseif r.bound ~= SLOT or r.held < share_of() then
      a.first = name
      break
    end
  end
  a.is_contended = s.short > (me.bound == SLOT and 1 or 0)
  a.others = redis.call('ZCARD', KEYS[3]) - (me.need and 1 or 0)
  for _, call in ipairs(calls) do
    local start, bound = EXCEEDS, nil
    for _, m in ipairs(config.meters) do
      bound = bound or ((call[m.resource] or 0) > m.amount and m.resource) or nil
    end
    if not bound then
      start, bound = answer(a, me, call)
    end
    if not start then
      stop, a.bound = call, bound
      break
    end
    a.answers[#a.answers + 1] = { start, bound }
  end
  if a.work > 0 then
    s.virtual = math.max(s.virtual, me.tag) + math.floor(a.work * 1000 / (s.weights - me.weight + weight))
    me.tag = me.tag + math.floor(a.work * 1000 / weight)
  end
  change(worker, me.held, stop, stop and a.bound, weight)
  me.due = now
  tell()
  if stop then
    wait(a, me, stop)
  end
  return a
end
