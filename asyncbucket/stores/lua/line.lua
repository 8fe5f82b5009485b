-- Line: the workers that wait, in order of arrival, for units and slots alike; and who is next.
--
-- A place is a worker, `since` when it stands there, what its first call costs (`call`) and waits for
-- (`bound`), for how many slots it waits (`wanted`) and how many it holds (`held`), `first` since when it
-- has been the first with this call (0: others come first), and when it is `due` to ask again.
-- The rules are those of asyncbucket/stores/store.py; asyncbucket/stores/sqlite/state.py follows them too.

local SLOT, PAUSED = 'concurrency', 'paused'
local SOON = 5000 -- before it no worker is asked to come again
local GRACE = 100000 -- who does not come within it is passed over
local ROUND = 20000 -- for each slot held, how long another waits until slots given back are not taken back
local STEP = 500000 -- how much later than the one before it a worker asks though nobody called it

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
    return s.paused, PAUSED
  end
  return when, bound
end

local function place_of(s, worker)
  for i, place in ipairs(s.line) do
    if place.worker == worker then
      return place, i
    end
  end
  return nil
end

local function line_leave(s, worker)
  local _, i = place_of(s, worker)
  if i then
    table.remove(s.line, i)
  end
end

local function is_full(place)
  return place.bound == SLOT
end

local function free_slots(s)
  return s.config.concurrency and s.config.concurrency - s.total or math.huge
end

-- How many slots a worker may hold while another with fewer waits.
local function share_of(s, worker, held)
  if not s.config.concurrency then
    return math.huge
  end
  local contenders = s.holders
  for _, place in ipairs(s.line) do
    if place.held == 0 then
      contenders = contenders + 1
    end
  end
  if worker and held == 0 and not place_of(s, worker) then
    contenders = contenders + 1
  end
  return math.ceil(s.config.concurrency / math.max(1, contenders))
end

-- How many free slots are kept for a worker in line: up to its share, at least 1.
local function reserved(place, share)
  return math.min(place.wanted, math.max(1, share - place.held))
end

-- Those who wait in the order of their turns, without those who missed theirs.
local function in_order(s, share)
  local order, above = {}, {}
  for _, place in ipairs(s.line) do
    if place.due >= s.now - GRACE then
      table.insert(place.held >= share and above or order, place)
    end
  end
  for _, place in ipairs(above) do
    order[#order + 1] = place
  end
  return order
end

-- Note whose turn it is: as many as there are free slots, and the first that waits for units. Return those
-- who do not know it yet, each with the microseconds until then.
local function call(s)
  local share, free, first, notices = share_of(s), free_slots(s), true, {}
  for _, place in ipairs(in_order(s, share)) do
    local come = place.due
    if is_full(place) then
      if free > 0 then
        free = free - reserved(place, share)
        come = s.now
      end
    elseif first then
      first = false
      come = math.max(s.now, earliest(s, place.call, place.first) - FAR)
    end
    if come < place.due - SOON then
      place.due = come
      notices[#notices + 1] = { place.worker, come - s.now }
    end
  end
  return notices
end

-- Tell workers in how many microseconds to come.
local function notify(channel, notices)
  for _, each in ipairs(notices) do
    redis.call('PUBLISH', channel .. each[1], as_integer(each[2]))
  end
end

-- Note how many slots a worker holds; return how many it held.
local function set_held(s, worker, held)
  local before = s.removed[worker] and 0 or tonumber(redis.call('HGET', KEYS[1], 'h:' .. worker) or 0)
  s.total = s.total + held - before
  s.holders = s.holders + (held > 0 and 1 or 0) - (before > 0 and 1 or 0)
  return before
end

-- Forget a worker; it is removed at the end: see `save_workers`.
local function forget(s, worker)
  set_held(s, worker, 0)
  s.removed[worker] = true
  line_leave(s, worker)
end

-- Forget those that gave no sign of life in time.
local function expire(s)
  s.removed = {}
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(s.now))) do
    forget(s, worker)
  end
end

-- Write what `forget` and `set_held` have noted; behind `save`, which a server short of memory refuses.
local function save_workers(s, worker, held, ttl)
  for name in pairs(s.removed) do
    redis.call('ZREM', KEYS[2], name)
    redis.call('HDEL', KEYS[1], 'r:' .. name, 'h:' .. name)
  end
  if ttl then
    redis.call('ZADD', KEYS[2], as_integer(s.now + ttl), worker)
    redis.call('HSET', KEYS[1], 'h:' .. worker, as_integer(held))
  end
  redis.call('PEXPIRE', KEYS[2], as_integer(lifetime(s) + s.ttl * 2 / 1000))
end
