-- Verbs: what a worker may ask. Every script is this one; ARGV[1] says which.

local function reply(s, fields)
  local parts = { '"now":' .. as_integer(s.now), '"epoch":"' .. s.epoch .. '"' }
  for name, value in pairs(fields) do
    parts[#parts + 1] = '"' .. name .. '":' .. value
  end
  return '{' .. table.concat(parts, ',') .. '}'
end

-- Each correction says when what was booked and used of each resource; and whether that keeps
-- its date: then it fills a limit, but no further.
local function correct(s, corrections)
  local now = math.max(s.now, s.last)
  for _, correction in ipairs(corrections) do
    local start, was_booked, was_used, is_dated = unpack(correction)
    for _, m in ipairs(s.meters) do
      local w, b, used = m.window, m.bucket, was_used[m.resource] or 0
      local more = used - (was_booked[m.resource] or 0)
      if more < 0 then
        window_unbook(w, -more, start)
        if b then
          bucket_unbook(b, -more, start, used)
        end
      elseif more > 0 and is_dated then
        if b then
          local room = bucket_available(b, now)
          if room > 0 then
            bucket_owe(b, math.min(more, room), now)
          end
        end
        window_fill(w, math.min(more, w.amount - w.used), start)
      elseif more > 0 then
        window_book(w, more, now)
        if b then
          bucket_owe(b, more, now)
        end
      end
    end
  end
end

-- What the windows have left, or less, for whoever must go on alone: booking makes them forget.
local function left(s)
  local units = {}
  for i, m in ipairs(s.meters) do
    window_forget(m.window, s.now) -- perhaps nobody has booked anything for long
    units[i] = as_integer(m.window.amount - m.window.used)
  end
  return '[' .. table.concat(units, ',') .. ']'
end

local function save_workers(s, text, seq)
  local more = {}
  for name in pairs(s.changed) do
    local r = s.records[name]
    if name == worker and text then
      r.seq, r.text = seq, text
    end
    more[#more + 1] = 'w:' .. name
    more[#more + 1] = cmsgpack.pack(r)
  end
  if s.is_new then
    more[#more + 1], more[#more + 2] = 'config', s.text
  end
  save(s, more)
  for name in pairs(s.removed) do
    redis.call('ZREM', KEYS[2], name)
    redis.call('HDEL', KEYS[1], 'w:' .. name)
  end
  local life = as_integer(lifetime(s) + s.ttl * 2 / 1000)
  redis.call('PEXPIRE', KEYS[2], life)
  redis.call('PEXPIRE', KEYS[3], life)
end

local verbs = {}

function verbs.commit(seq, held, weight, corrections, asks, sets_config, pause, step, starts)
  seq, held, weight = tonumber(seq), tonumber(held), tonumber(weight)
  if sets_config == '1' then
    redis.call('PUBLISH', channel .. worker, '-1') -- tells nobody, but is refused whom ACLs forbid to tell
  end
  local s = load(known_epoch, starts)
  s.is_new = sets_config == '1' and configure(s, config) or s.is_new
  if s.text ~= config then
    return reply(s, { config = s.text })
  end
  for _, m in ipairs(s.meters) do
    if m.window.resets ~= '' and not window_knows(m.window, s.now - s.offset) then
      return '{"wall":' .. as_integer(s.now - s.offset) .. '}'
    end
  end
  local me = record_of(s, worker)
  if me.seq == seq then
    return me.text
  end
  expire(s, worker, ttl)
  me, s.removed[worker] = record_of(s, worker), nil
  if not me.seq then
    s.grown = s.now
  end
  local till = s.now + tonumber(pause)
  if till > s.now and till > s.paused then
    s.paused, s.ramp = till, nil
    if tonumber(step) > 0 then
      s.ramp = { start = till, step = tonumber(step), calls = 1 }
    end
  end
  correct(s, cjson.decode(corrections))
  local before = me.held
  change(s, worker, held, me.need, me.weight, me.bound)
  local a = admit(s, worker, cjson.decode(asks), weight, before - held)
  local units = left(s)
  local rivals = s.short - (is_full(me) and 1 or 0)
  local text = reply(s, {
    answers = '[' .. table.concat(a.answers, ',') .. ']',
    ask = as_integer(a.ask),
    soonest = as_integer(a.soonest),
    bound = cjson.encode(a.bound),
    left = units,
    workers = redis.call('ZCOUNT', KEYS[2], '(' .. as_integer(s.now), '+inf'),
    steady = as_integer(s.now - s.grown),
    crowded = tostring(rivals > 0 or 2 * free_slots(s) < (s.config.concurrency or 0)),
    inline = tostring(me.need ~= nil),
  })
  save_workers(s, text, seq)
  if s.is_new then
    redis.call('PUBLISH', channel .. '*', '0')
  end
  return text
end

-- Writes nothing.
function verbs.peek()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('')
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
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(s.now))) do
    local kept = redis.call('HGET', KEYS[1], 'w:' .. name)
    s.lent = s.lent - (kept and cmsgpack.unpack(kept).held or 0)
  end
  return reply(s, {
    config = s.text,
    uses = '[' .. table.concat(uses, ',') .. ']',
    slots = as_integer(s.config.concurrency and s.lent or 0),
    paused = as_integer(s.paused),
    last = as_integer(s.last),
    workers = redis.call('ZCOUNT', KEYS[2], '(' .. as_integer(s.now), '+inf'),
  })
end

function verbs.leave()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  local s = load('')
  expire(s)
  forget(s, worker)
  tell(s)
  save_workers(s)
  return '{}'
end

return verbs[ARGV[1]](unpack(ARGV, 8))
