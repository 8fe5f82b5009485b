-- State: one hash holds what is known of a limiter, so that it is lost as a whole or not at all.
--
-- `state` is packed numbers, `config` the limits as their last author wrote them, `w:<worker>` what is known of
-- a worker; the rest are windows' entries. KEYS[2] holds the workers by their expiry, KEYS[3] those that wait, by
-- virtual time. Instants are microseconds of the server's clock plus an offset that grows when that clock goes
-- back: they never decrease.

local HOUR = 3600000000 -- a state is kept for longer, for workers that come back late
local FOREVER = 1e15 -- ms: a server takes no time to live that is much longer

-- What a worker says about itself comes first in ARGV, behind the verb.
local worker, known_epoch, new_epoch, config, channel, ttl = unpack(ARGV, 2, 7)
ttl = tonumber(ttl)

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

-- Give the meters of `config` their numbers and what was kept of them.
local function build_meters(s, config)
  local meters = {}
  for i, m in ipairs(config.meters) do
    local w, b = s.windows[m.key], s.buckets[m.key]
    local date = math.max(s.now, s.last)
    w = w or window_new(date) -- what was booked before gives nothing back
    w.amount, w.grain, w.hold, w.prefix = m.amount, m.grain, m.hold, 'e:' .. m.key .. ':'
    w.cache, w.dirty, w.gone, w.offset = {}, {}, {}, s.offset
    window_set_resets(w, m.resets or '', date)
    w.starts = s.starts[m.key] or w.starts
    s.windows[m.key] = w
    if m.p then
      b = b or bucket_new(date)
      if b.p and (b.p ~= m.p or b.q ~= m.q) then
        bucket_reshape(b, m.p, m.q, date)
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
end

-- Nothing is available until all has flowed in anew, behind what was lent ahead.
local function drain(s)
  s.last = math.max(s.now + 2 * FAR, s.last)
  for _, m in ipairs(s.meters) do
    window_book(m.window, m.window.amount, s.last)
    if m.bucket then
      bucket_owe(m.bucket, m.window.amount, s.last)
    end
  end
end

-- Load what is kept, or begin: with all available, unless a worker knows of an epoch that is gone. `starts` says
-- when windows begin that reset by the calendar, where a worker was asked to say so.
local function load(known_epoch, starts)
  local kept = redis.call('HMGET', KEYS[1], 'state', 'config')
  local s
  if kept[1] then
    s = cmsgpack.unpack(kept[1])
    if s.schema ~= SCHEMA then
      error({ err = 'SCHEMA ' .. as_integer(s.schema or 1) .. ' ' .. SCHEMA })
    end
    s.text = kept[2]
  else
    s = {
      schema = SCHEMA, epoch = new_epoch, before = '', seen = 0, offset = 0, last = 0, bound = '', paused = 0,
      ttl = 0, lent = 0, claims = 0, short = 0, weights = 0, virtual = 0, joined = 0, slice = 0, grown = 0,
      windows = {}, buckets = {}, text = config, is_new = true,
    }
  end
  clock(s)
  s.records, s.changed, s.removed = {}, {}, {}
  s.starts = starts and cjson.decode(starts) or {}
  build_meters(s, cjson.decode(s.text))
  s.ttl = math.max(s.ttl, ttl)
  if known_epoch ~= '' and known_epoch ~= s.epoch and known_epoch ~= s.before then
    s.before = known_epoch
    drain(s)
  end
  return s
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
  return math.min(math.ceil((ends - s.now + HOUR) / 1000), FOREVER)
end

-- Write all at once, with `more` fields.
local function save(s, more)
  local windows, buckets = {}, {}
  for key, w in pairs(s.windows) do
    windows[key] = {
      used = w.used, last = w.last, recent = w.recent, closes = w.closes,
      forgotten = w.forgotten, head = w.head, tail = w.tail,
      resets = w.resets, opened = w.opened, starts = w.starts,
    }
  end
  for key, b in pairs(s.buckets) do
    buckets[key] = {
      at = b.at, backlog = b.backlog, full_at = b.full_at, dates = b.dates, lows = b.lows,
      p = b.p, q = b.q,
    }
  end
  local kept = { windows = windows, buckets = buckets, ramp = s.ramp }
  for _, name in ipairs({
    'schema', 'epoch', 'before', 'seen', 'offset', 'last', 'bound', 'paused', 'ttl', 'lent', 'claims', 'short',
    'weights', 'virtual', 'joined', 'slice', 'grown',
  }) do
    kept[name] = s[name]
  end
  local fields, gone = { 'state', cmsgpack.pack(kept) }, {}
  for _, m in ipairs(s.meters) do
    local w = m.window
    for _, field in ipairs(w.gone) do
      gone[#gone + 1] = field
    end
    for i in pairs(w.dirty) do
      if i >= w.head then
        fields[#fields + 1] = w.prefix .. i
        fields[#fields + 1] = struct.pack(ENTRY, w.cache[i][1], w.cache[i][2])
      end
    end
  end
  for _, each in ipairs(more or {}) do
    fields[#fields + 1] = each
  end
  redis.call('HSET', KEYS[1], unpack(fields))
  for i = 1, #gone, 1000 do
    redis.call('HDEL', KEYS[1], unpack(gone, i, math.min(i + 999, #gone)))
  end
  redis.call('PEXPIRE', KEYS[1], as_integer(lifetime(s)))
end

-- Put other limits in force, as LimitConfig.after has it; what is booked under limits that stay, stays.
local function configure(s, text)
  if text == s.text then
    return false
  end
  local config, before = cjson.decode(text), s.config
  local is_given = #before.meters > 0 and not before.learned
  local drops_all = #config.meters == 0 and (#before.meters > 0 or (before.concurrency and not config.concurrency))
  if drops_all or (config.learned and is_given) then
    return false -- the worker asks again, with what stays
  end
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
  build_meters(s, config)
  return true
end
