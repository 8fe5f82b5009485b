-- Verbs: what a worker may ask. Every script is this one; ARGV[1] says which.

-- Each correction says when what was booked and used of each resource; and whether that keeps
-- its date: then it fills a limit, but no further.
local function correct(corrections)
  local date = math.max(now, s.last)
  for _, correction in ipairs(corrections) do
    local start, was_booked, was_used, is_dated = unpack(correction)
    for _, m in ipairs(config.meters) do
      local used = was_used[m.resource] or 0
      local more = used - (was_booked[m.resource] or 0)
      if more < 0 then
        meter_unbook(m, -more, start, used)
      elseif more > 0 and is_dated then
        meter_fill(m, more, start, date)
      elseif more > 0 then
        meter_book(m, more, date)
      end
    end
  end
end

-- Reply as JSON, with what everybody may know. Integers are strings: they may be too long for cjson.
local function reply(fields)
  fields.left = {}
  for i, m in ipairs(config.meters) do
    window_forget(m, now) -- perhaps nobody has booked anything for long
    fields.left[i] = as_integer(m.amount - m.w.used)
  end
  fields.now, fields.epoch = as_integer(now), s.epoch
  fields.workers = redis.call('ZCOUNT', KEYS[2], '(' .. as_integer(now), '+inf')
  return cjson.encode(fields)
end

local verbs = {}

-- `replaced` are the limits that a worker replaces by its own; '' if it does not.
function verbs.commit(seq, held, weight, corrections, calls, replaced, pause, told)
  seq, held = tonumber(seq), tonumber(held)
  if replaced ~= '' then
    redis.call('PUBLISH', channel, '-1 ' .. worker) -- tells nobody, but is refused whom ACLs forbid to tell
  end
  load(told)
  local is_new = redis.call('EXISTS', KEYS[1]) == 0
  local sets_config = is_new or text ~= config_text
  if text ~= config_text and text ~= replaced then
    return cjson.encode({ config = text }) -- it asks again, under these, or to replace these
  elseif text ~= config_text then
    configure()
  end
  for _, m in ipairs(config.meters) do
    local n = window_period(m.w, now - offset)
    if m.w.resets ~= '' and not (n > 1 and n < #m.w.starts - 1) then
      return cjson.encode({ wall = as_integer(now - offset) })
    end
  end
  local me = record_of(worker)
  if me.seq == seq then
    return me.text
  end
  expire(worker)
  me = record_of(worker)
  s.grown = me.seq and s.grown or now
  s.paused = math.max(s.paused, pause > '0' and now + pause or 0)
  correct(cjson.decode(corrections))
  change(worker, held, me.need, me.bound, me.weight)
  local a = admit(cjson.decode(calls), tonumber(weight))
  local rivals = s.short - (me.bound == SLOT and 1 or 0)
  me.seq, me.channel, me.text = seq, channel, reply({
    answers = a.answers,
    ask = as_integer(a.ask),
    soonest = as_integer(a.soonest),
    bound = a.bound,
    steady = as_integer(now - s.grown),
    crowded = rivals > 0 or 2 * free_slots() < (config.concurrency or 0),
    in_line = me.need ~= nil,
  })
  save(sets_config)
  if sets_config then
    redis.call('PUBLISH', 'asyncbucket:wake:*', '0 ' .. KEYS[1])
  end
  return me.text
end

-- Writes nothing.
function verbs.peek()
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return '{}'
  end
  load('{}')
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', as_integer(now))) do
    s.lent = s.lent - record_of(name).held
  end
  return reply({
    config = text,
    slots = config.concurrency and s.lent or 0,
    paused = as_integer(s.paused),
    last = as_integer(s.last),
  })
end

function verbs.leave()
  if redis.call('EXISTS', KEYS[1]) == 1 then
    load('{}')
    expire()
    forget(worker)
    redis.call('ZREM', KEYS[2], worker)
    tell()
    save()
  end
  return '{}'
end

return verbs[ARGV[1]](unpack(ARGV, 8))
