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
    lost = s.lost and 'true' or 'false',
    life = as_integer(lifetime(s)),
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

-- What the worker was told while it was not listening: in how long to come, or -1. Writes nothing.
function verbs.turn(waits)
  local s = load('', new_epoch, config, ttl)
  local come = -1
  if s.text ~= config then
    come = 0
  elseif waits == '1' then
    local place = place_of(s, worker)
    if not place then
      come = 0
    else
      come = math.max(0, place.due - s.now)
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
