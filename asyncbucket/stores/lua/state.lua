-- State: one hash holds all that is known of a limiter, so that it is lost as a whole or not at all.
--
-- `state` is packed numbers, `config` the limits as their last author wrote them, `r:<worker>` what
-- the worker's last batch was answered, `h:<worker>` how many slots it holds (in sum `total`, by `holders`
-- workers); the rest are windows' entries. KEYS[2] holds workers by their expiry. Instants are microseconds
-- of the server's clock plus an offset that grows when that clock goes back: they never decrease.

local SCHEMA = 3 -- of this state; others are refused
local MINUTE = 60000000
local FAR = 250000 -- a call whose start lies farther ahead is not booked, but for those of its batch
local FOREVER = 1e15 -- ms: a server takes no time to live that is much longer

local function as_integer(number)
  return string.format('%.0f', number)
end

local function clock(s)
  local time = redis.call('TIME')
  local raw = time[1] * 1000000 + time[2]
  if raw < s.seen then
    s.offset = s.offset + s.seen - raw
  end
  s.seen = raw
  s.now = raw + s.offset
end

local function prefix_of(key)
  return 'e:' .. key .. ':'
end

-- Give the meters of `config` their numbers and what was kept of them; return what is new.
local function build_meters(s, config)
  local meters, new_keys = {}, {}
  for i, m in ipairs(config.meters) do
    local w, b = s.windows[m.key], s.buckets[m.key]
    if not w then
      w = window_new()
      new_keys[#new_keys + 1] = m.key
    end
    w.amount, w.grain, w.hold, w.prefix = m.amount, m.grain, m.hold, prefix_of(m.key)
    w.cache, w.dirty, w.gone = {}, {}, {}
    s.windows[m.key] = w
    if m.p then
      b = b or bucket_new()
      if b.p and (b.p ~= m.p or b.q ~= m.q) then
        bucket_reshape(b, m.p, m.q, math.max(s.now, s.last))
      end
      b.p, b.q, b.burst, b.room = m.p, m.q, m.burst, m.burst * m.p
      s.buckets[m.key] = b
    else
      s.buckets[m.key] = nil
      b = nil
    end
    meters[i] = { resource = m.resource, window = w, bucket = b }
  end
  s.meters, s.config = meters, config
  return new_keys
end

-- Nothing is available until all has flowed in anew, behind the calls that were booked ahead: they go.
local function drain(s)
  s.last = math.max(s.now + 2 * FAR, s.last)
  for _, m in ipairs(s.meters) do
    window_drain(m.window, s.last)
    if m.bucket then
      bucket_drain(m.bucket, s.last)
    end
  end
end

local function new_state(epoch)
  return {
    schema = SCHEMA, epoch = epoch, before = '', seen = 0, offset = 0, last = 0, bound = '', paused = 0,
    ttl = 0, total = 0, holders = 0, windows = {}, buckets = {}, line = {},
  }
end

-- Load what is kept, or begin: with all available, unless a worker knows of an epoch that is gone.
local function load(known_epoch, new_epoch, config_text, ttl)
  local kept = redis.call('HMGET', KEYS[1], 'state', 'config')
  local s
  if kept[1] then
    s = cmsgpack.unpack(kept[1])
    if s.schema ~= SCHEMA then
      error({ err = 'SCHEMA ' .. as_integer(s.schema or 1) .. ' ' .. SCHEMA })
    end
    s.text = kept[2]
    clock(s)
    build_meters(s, cjson.decode(s.text))
  else
    s = new_state(new_epoch)
    s.text = config_text
    clock(s)
    build_meters(s, cjson.decode(s.text))
  end
  s.ttl = math.max(s.ttl, tonumber(ttl))
  if known_epoch ~= '' and known_epoch ~= s.epoch and known_epoch ~= s.before then
    s.lost = true
    s.before = known_epoch
    drain(s)
  end
  return s
end

local function save_window(w)
  for at = 1, #w.gone, 500 do
    redis.call('HDEL', KEYS[1], unpack(w.gone, at, math.min(at + 499, #w.gone)))
  end
  local fields = {}
  for i in pairs(w.dirty) do
    if i >= w.head then
      fields[#fields + 1] = w.prefix .. i
      fields[#fields + 1] = struct.pack(ENTRY, w.cache[i][1], w.cache[i][2])
    end
    if #fields >= 1000 then
      redis.call('HSET', KEYS[1], unpack(fields))
      fields = {}
    end
  end
  if #fields > 0 then
    redis.call('HSET', KEYS[1], unpack(fields))
  end
end

-- How long (ms) it takes until nothing is left to remember.
local function lifetime(s)
  local ends = math.max(s.paused, s.now + s.ttl)
  for _, m in ipairs(s.meters) do
    local w, b = m.window, m.bucket
    ends = math.max(ends, math.max(w.last, s.now) + w.hold)
    if b then
      ends = math.max(ends, b.at + math.ceil(b.backlog / b.q))
    end
  end
  return math.min(math.ceil((ends - s.now + MINUTE) / 1000), FOREVER)
end

-- Write all at once; the first write is one that a server short of memory refuses.
local function save(s)
  local windows, buckets = {}, {}
  for key, w in pairs(s.windows) do
    windows[key] = {
      used = w.used, last = w.last, recent = w.recent, closes = w.closes,
      forgotten = w.forgotten, head = w.head, tail = w.tail,
    }
  end
  for key, b in pairs(s.buckets) do
    buckets[key] = {
      at = b.at, backlog = b.backlog, full_at = b.full_at, dates = b.dates, lows = b.lows,
      p = b.p, q = b.q,
    }
  end
  local kept = cmsgpack.pack({
    epoch = s.epoch, before = s.before, seen = s.seen, offset = s.offset, last = s.last,
    bound = s.bound, paused = s.paused, ramp = s.ramp, line = s.line, ttl = s.ttl, total = s.total,
    holders = s.holders, schema = s.schema, windows = windows, buckets = buckets,
  })
  redis.call('HSET', KEYS[1], 'state', kept, 'config', s.text)
  for _, m in ipairs(s.meters) do
    save_window(m.window)
  end
  redis.call('PEXPIRE', KEYS[1], as_integer(lifetime(s)))
end

-- Put other limits in force; what is booked under limits that stay, stays.
local function configure(s, text)
  if text == s.text then
    return false
  end
  local config = cjson.decode(text)
  local named = {}
  for _, m in ipairs(config.meters) do
    named[m.key] = true
  end
  for key, w in pairs(s.windows) do
    if not named[key] then
      for i = w.head, w.tail - 1 do
        redis.call('HDEL', KEYS[1], w.prefix .. i)
      end
      s.windows[key], s.buckets[key] = nil, nil
    end
  end
  s.text = text
  s.line = {} -- what they wait for is named by other numbers now: they ask again
  for _, key in ipairs(build_meters(s, config)) do -- what was booked before it began gives nothing back
    s.windows[key].forgotten = math.max(s.now, s.last)
  end
  return true
end

-- Note how many slots a worker holds, and that it lives; return how many it held.
local function set_held(s, worker, held)
  local before = tonumber(redis.call('HGET', KEYS[1], 'h:' .. worker) or 0)
  if held and held ~= before then
    s.total = s.total + held - before
    s.holders = s.holders + (held > 0 and 1 or 0) - (before > 0 and 1 or 0)
  end
  return before
end

-- Forget workers; they are removed at the end: see `save_workers`.
local function forget_workers(s, names)
  for _, worker in ipairs(names) do
    s.removed[#s.removed + 1] = worker
    set_held(s, worker, 0)
    for i, place in ipairs(s.line) do
      if place.worker == worker then
        table.remove(s.line, i)
        break
      end
    end
  end
end

-- Forget those that gave no sign of life in time.
local function expire(s)
  s.removed = {}
  forget_workers(s, redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(s.now)))
end

-- Write what `forget_workers` and `set_held` have noted; behind `save`, which a server short of memory refuses.
local function save_workers(s, worker, held, ttl)
  for _, name in ipairs(s.removed) do
    redis.call('ZREM', KEYS[2], name)
    redis.call('HDEL', KEYS[1], 'r:' .. name, 'h:' .. name)
  end
  if ttl then
    redis.call('ZADD', KEYS[2], as_integer(s.now + ttl), worker)
    redis.call('HSET', KEYS[1], 'h:' .. worker, as_integer(held))
  end
  redis.call('PEXPIRE', KEYS[2], as_integer(lifetime(s) + s.ttl * 2 / 1000))
end
