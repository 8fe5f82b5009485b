-- Verbs: what a worker may ask. Every script is this one; ARGV[1] says which.

local function reply(s, fields)
  local parts = { '"now":' .. as_integer(s.now), '"epoch":"' .. s.epoch .. '"' }
  for name, value in pairs(fields) do
    parts[#parts + 1] = '"' .. name .. '":' .. value
  end
  return '{' .. table.concat(parts, ',') .. '}'
end

local function read(text)
  return text == '' and {} or cjson.decode(text)
end

-- What the windows have left, or less, for whoever must go on alone: booking makes them forget.
local function left(s)
  local units = {}
  for i, m in ipairs(s.meters) do
    units[i] = as_integer(m.window.amount - m.window.used)
  end
  return '[' .. table.concat(units, ',') .. ']'
end

-- Those whose turn has come, each with the microseconds until then.
local function due(s, free)
  local notices = {}
  if s.config.concurrency and #s.line > 0 then
    line_prune(s)
    notices = line_call(s, free or s.config.concurrency - slots_used(s))
  end
  turns_prune(s)
  local first, delay = turns_call(s)
  if first then
    notices[#notices + 1] = { first, delay }
  end
  return notices
end

-- What a worker says about itself comes first in ARGV, behind the verb.
local worker, known_epoch, new_epoch, config, channel, ttl = unpack(ARGV, 2, 7)
ttl = tonumber(ttl)

local verbs = {}

function verbs.commit(seq, horizon, held, corrections, released, calls)
  corrections, released, calls = read(corrections), read(released), read(calls)
  seq, horizon, held = tonumber(seq), tonumber(horizon), tonumber(held)
  local s = load(known_epoch, new_epoch, config, ttl)
  if s.text ~= config then
    return reply(s, { terms = s.text })
  end
  local answered = redis.call('HGET', KEYS[1], 'r:' .. worker)
  if answered then
    local last, text = answered:match('^(%d+) (.*)$')
    if tonumber(last) == seq then
      return text
    elseif tonumber(last) > seq then
      return redis.error_reply('STALE batch ' .. as_integer(seq) .. ' after ' .. last)
    end
  end
  local debts = correct(s, corrections)
  for at = 1, #released, 500 do
    redis.call('ZREM', KEYS[2], unpack(released, at, math.min(at + 499, #released)))
  end
  local a = admit(s, worker, seq, calls, horizon, held)
  if a.stopped == NOT_BOOKED.full then
    a.ask = ask_again(s, s.now + ttl)
  end
  local notices = due(s, a.free)
  local text = reply(s, {
    debts = as_integer(debts),
    ask = as_integer(a.ask),
    lost = s.lost and 'true' or 'false',
    life = as_integer(lifetime(s)),
    left = left(s),
    workers = redis.call('ZCARD', KEYS[3]),
    crowded = tostring(#s.line > (a.stopped == NOT_BOOKED.full and 1 or 0)),
    bookings = '[' .. table.concat(a.answers, ',') .. ']',
  })
  save(s)
  redis.call('HSET', KEYS[1], 'r:' .. worker, as_integer(seq) .. ' ' .. text)
  if #a.slots > 0 then
    renew(s, worker, ttl, a.slots, a.starts)
  end
  notify(channel, notices)
  return text
end

function verbs.open()
  redis.call('PUBLISH', channel .. worker, '-1') -- tells nobody, but is refused whom ACLs forbid to tell
  local s = load(known_epoch, new_epoch, config, ttl)
  local other = configure(s, config)
  renew(s, worker, ttl, {})
  expire(s)
  save(s)
  if other then
    redis.call('PUBLISH', channel .. '*', '0')
  end
  return reply(s, { life = as_integer(lifetime(s)) })
end

function verbs.heartbeat(slots)
  local s = load(known_epoch, new_epoch, config, ttl)
  for _, m in ipairs(s.meters) do -- perhaps nobody has booked anything for long
    window_forget(m.window, s.now)
  end
  renew(s, worker, ttl, read(slots))
  expire(s)
  local notices = due(s)
  save(s)
  notify(channel, notices)
  local fields = { workers = redis.call('ZCARD', KEYS[3]), life = as_integer(lifetime(s)), left = left(s) }
  if s.text ~= config then
    fields.terms = s.text
  end
  return reply(s, fields)
end

function verbs.pause(span, step)
  local s = load(known_epoch, new_epoch, config, ttl)
  local till = s.now + tonumber(span)
  if till > s.paused then
    s.paused, s.ramp = till, nil
    if tonumber(step) > 0 then
      s.ramp = { start = till, step = tonumber(step), calls = 1 }
    end
  end
  save(s)
  return reply(s, {})
end

function verbs.configure(text)
  local s = load(known_epoch, new_epoch, config, ttl)
  if configure(s, text) then
    local notices = due(s)
    save(s)
    redis.call('PUBLISH', channel .. '*', '0')
    notify(channel, notices)
  end
  return reply(s, {})
end

-- What the worker was told while it was not listening: in how long to come, or -1. Writes nothing.
function verbs.turn(waits)
  local s = load('', new_epoch, config, ttl)
  local come = -1
  if s.text ~= config then
    come = 0
  elseif waits == '1' then
    local place, i = turns_of(s, worker)
    if place then
      local when = earliest(s, place.amounts, 0, place.since > 0 and place.since or nil)
      come = i == 1 and math.max(0, when - FAR - s.now) or -1
    else
      come = 0
      for _, each in ipairs(s.line) do
        if each[1] == worker and each[2] == 0 then
          come = -1
        end
      end
    end
  end
  return reply(s, { come = as_integer(come) })
end

-- Writes nothing.
function verbs.peek()
  if config == '' and redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('', new_epoch, config, ttl)
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
    terms = s.text,
    uses = '[' .. table.concat(uses, ',') .. ']',
    slots = as_integer(s.config.concurrency and slots_used(s) or 0),
    paused = as_integer(s.paused),
    last = as_integer(s.last),
    workers = as_integer(redis.call('ZCOUNT', KEYS[3], '(' .. as_integer(s.now), '+inf')),
  })
end

function verbs.leave()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('', new_epoch, config, ttl)
  line_leave(s, worker)
  turns_leave(s, worker)
  local notices = due(s)
  save(s)
  redis.call('ZREM', KEYS[3], worker)
  redis.call('HDEL', KEYS[1], 'r:' .. worker)
  notify(channel, notices)
  return '{}'
end

return verbs[ARGV[1]](unpack(ARGV, 8))
