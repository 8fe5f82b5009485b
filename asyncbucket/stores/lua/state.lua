-- State: one hash holds what is known of a limiter, so that it is lost as a whole or not at all.
--
-- `state` is packed, `config` the limits as their last author wrote them, `w:<worker>` what is known of a worker; the
-- rest are windows' entries. KEYS[2] holds the workers by their expiry, KEYS[3] those that wait, by virtual time.
-- Instants are microseconds of the server's clock plus an offset that grows when that clock goes back: they never
-- decrease. The first write of a batch is one that a server short of memory refuses.

local HOUR = 3600000000 -- a state is kept for longer, for workers that come back late
local FOREVER = 1e15 -- ms: a server takes no time to live that is much longer

-- What a worker says about itself comes first in ARGV, behind the verb.
local worker, known_epoch, new_epoch, config_text, channel, ttl = unpack(ARGV, 2, 7)
ttl = tonumber(ttl)

local s -- what is packed
local text, config -- the limits in force
local starts -- when windows begin that reset by the calendar, where a worker was asked to say so
local records = {} -- of workers

local function as_integer(number)
  return string.format('%.0f', number)
end

-- Give the meters of `config` what was kept of them. What was booked before gives nothing back; in a state that
-- `is_new`, nothing was.
local function build_meters(is_new)
  local date = math.max(now, s.last)
  local began = is_new and date - 1 or date
  config = cjson.decode(text)
  for _, m in ipairs(config.meters) do
    m.prefix = 'e:' .. m.key .. ':'
    m.w = s.windows[m.key] or window_new(began)
    window_set_resets(m, date)
    m.w.starts = starts[m.key] or m.w.starts
    m.w.b = m.p and (m.w.b or (m.is_paced and bucket_new(m, began))) or nil
    s.windows[m.key] = m.w
    if m.w.b then
      bucket_reshape(m.w.b, m.p, m.q, date)
    end
  end
end

-- Load what is kept, or begin: with all available, unless the worker knows of an epoch that is gone. Then nothing is
-- available until all has flowed in anew, behind what was booked ahead.
local function load(told)
  local kept = redis.call('HMGET', KEYS[1], 'state', 'config')
  text = kept[2] or config_text
  s = kept[1] and cmsgpack.unpack(kept[1]) or {
    schema = SCHEMA, epoch = new_epoch, before = '', seen = 0, offset = 0, last = 0, bound = '', paused = 0, ttl = 0,
    lent = 0, claims = 0, short = 0, weights = 0, virtual = 0, joined = 0, grown = 0, windows = {},
  }
  if s.schema ~= SCHEMA then
    error({ err = 'SCHEMA ' .. as_integer(s.schema or 1) .. ' ' .. SCHEMA })
  end
  local time = redis.call('TIME')
  local raw = time[1] * 1000000 + time[2]
  s.offset, s.seen, s.ttl = s.offset + math.max(0, s.seen - raw), raw, math.max(s.ttl, ttl)
  now, offset = raw + s.offset, s.offset
  starts = cjson.decode(told)
  build_meters(not kept[1])
  if known_epoch ~= '' and known_epoch ~= s.epoch and known_epoch ~= s.before then
    s.before, s.last = known_epoch, math.max(now + 2 * FAR, s.last)
    for _, m in ipairs(config.meters) do
      meter_fill(m, m.amount, s.last, s.last)
    end
  end
end

-- Put the worker's limits in force; what is booked under limits that stay, stays.
local function configure()
  local before = s.windows
  text, s.windows = config_text, {}
  for _, m in ipairs(cjson.decode(text).meters) do
    s.windows[m.key] = before[m.key]
  end
  for key, w in pairs(before) do
    if not s.windows[key] then
      drop_entries('e:' .. key .. ':', w, w.tail)
    end
  end
  build_meters()
end

-- Keep all until nothing is left to remember.
local function save(sets_config)
  local ends = math.max(s.paused, now + s.ttl)
  for _, m in ipairs(config.meters) do
    ends = math.max(ends, math.max(m.w.last, now) + m.hold)
    if m.w.b then
      ends = math.max(ends, m.w.b.at + math.ceil(m.w.b.backlog / m.w.b.q))
    end
  end
  for i = 1, #gone, 1000 do
    redis.call('HDEL', KEYS[1], unpack(gone, i, math.min(i + 999, #gone)))
  end
  local fields = { 'state', cmsgpack.pack(s), unpack(sets_config and { 'config', text } or {}) }
  for name, value in pairs(changed) do
    fields[#fields + 1], fields[#fields + 2] = name, cmsgpack.pack(value)
  end
  redis.call('HSET', KEYS[1], unpack(fields))
  for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, as_integer(math.min(math.ceil((ends - now + HOUR + s.ttl) / 1000), FOREVER)))
  end
end
