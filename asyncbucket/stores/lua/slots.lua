-- Slots: leases that expire, and the line of workers that wait for one.
--
-- KEYS[2] holds slots by their expiry, KEYS[3] workers likewise. A place in the line is a worker, when
-- it was called (0: not yet), how many slots it held and how many more it wanted when it last asked.
-- A worker may take a slot if enough are free besides to bring the others in line up to what it holds
-- already, and one further those ahead of it. So what a worker with few slots gives back serves its own
-- calls at once; those with many wait for their turn, and equals take turns, in order of arrival. (A slot
-- that changes hands costs two round trips, one to give and one to take. So of equals with several slots
-- all but one in `ROUND` take back what they gave.) Whoever was called and does not come in time loses
-- its place.

local CALL_TIMEOUT = 100000
local FEW = 4
local ROUND = 32

local function slots_used(s)
  return redis.call('ZCOUNT', KEYS[2], '(' .. as_integer(s.now), '+inf')
end

local function line_prune(s, worker)
  local kept = {}
  for _, place in ipairs(s.line) do
    if place[2] == 0 or s.now - place[2] <= CALL_TIMEOUT or place[1] == worker then
      kept[#kept + 1] = place
    end
  end
  s.line = kept
end

-- Take a worker out of the line; return how many stood ahead of it, and how many slots it wanted.
local function line_leave(s, worker)
  local kept, ahead, wanted = {}, nil, 0
  for i, place in ipairs(s.line) do
    if place[1] == worker then
      ahead, wanted = i - 1, place[4]
    else
      kept[#kept + 1] = place
    end
  end
  s.line = kept
  return ahead or #kept, wanted
end

-- Put a worker behind `ahead` others.
local function line_enter(s, worker, ahead, held, wanted)
  table.insert(s.line, math.min(ahead, #s.line) + 1, { worker, 0, held, wanted })
end

-- Whether a worker that holds `held` slots, with `ahead` others before it, may take one of `free`.
local function line_allows(s, free, ahead, held, seq)
  local kept = 0
  local first = (held >= FEW and seq % ROUND ~= 0) and 0 or 1
  for i, place in ipairs(s.line) do
    local level = held + (i <= ahead and first or 0)
    kept = kept + math.max(0, math.min(level - place[3], place[4]))
  end
  return free > kept
end

-- Call those whose turn has come, fewest slots first; return whom to notify at the end.
local function line_call(s, free)
  local order, notices = {}, {}
  for i, place in ipairs(s.line) do
    order[i] = { place, i }
  end
  table.sort(order, function(a, b)
    return a[1][3] < b[1][3] or (a[1][3] == b[1][3] and a[2] < b[2])
  end)
  for i = 1, math.min(free, #order) do
    local place = order[i][1]
    if place[2] == 0 then
      place[2] = s.now
      notices[#notices + 1] = { place[1], 0 }
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

-- Drop workers and slots that gave no sign of life in time. Not before `renew`: this is what a server
-- short of memory never refuses, and behind it nothing else.
local function expire(s)
  local now = as_integer(s.now)
  local dead = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)
  for _, worker in ipairs(dead) do
    line_leave(s, worker)
    turns_leave(s, worker)
    redis.call('HDEL', KEYS[1], 'r:' .. worker)
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
end

-- Prolong the life of a worker and of its slots; `starts` says since when, if not from now on.
local function renew(s, worker, ttl, slots, starts)
  redis.call('ZADD', KEYS[3], as_integer(s.now + ttl), worker)
  for i, slot in ipairs(slots) do
    redis.call('ZADD', KEYS[2], as_integer((starts and starts[i] or s.now) + ttl), slot)
  end
  redis.call('PEXPIRE', KEYS[2], as_integer(s.ttl * 2 / 1000 + 1000))
  -- The names of the dead are needed as long as there is something of theirs to remove.
  redis.call('PEXPIRE', KEYS[3], as_integer(lifetime(s) + s.ttl * 2 / 1000))
end
