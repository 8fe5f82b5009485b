-- State: one hash holds all that is known of a limiter, so that it is lost as a whole or not at all.
--
-- `state` is packed numbers, `config` the limits as their last author wrote them, `r:<worker>` what
-- the worker's last batch was answered, `h:<worker>` how many slots it holds (in sum `total`, by `holders`
-- workers); the rest are windows' entries. KEYS[2] holds workers by their expiry. Instants are microseconds
-- of the server's clock plus an offset that grows when that clock goes back: they never decrease.

local SCHEMA = 4 -- of this state; others are refused
local HOUR = 3600000000 -- a state is kept for longer, for workers that come back late
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

local function owe(m, amount, date)
  window_book(m.window, amount, date)
  if m.bucket then
    bucket_owe(m.bucket, amount, date)
  end
end

-- Nothing is available until all has flowed in anew, behind the calls that were booked ahead: they go.
local function drain(s)
  s.last = math.max(s.now + 2 * FAR, s.last)
  for _, m in ipairs(s.meters) do
    owe(m, m.window.amount, s.last)
  end
end

local function new_state(epoch)
  return {
    schema = SCHEMA, epoch = epoch, before = '', seen = 0, offset = 0, last = 0, bound = '', paused = 0,
    ttl = 0, total = 0, holders = 0, windows = {}, buckets = {}, line = {},
  }
end

-- Load what is kept, or begin: with all available, unless a worker knows of an epoch that is gone. `starts` says
-- when windows begin that reset by the calendar, where a worker was asked to say so.
local function load(known_epoch, new_epoch, config_text, ttl, starts)
  local kept = redis.call('HMGET', KEYS[1], 'state', 'config')
  local s
  if kept[1] then
    s = cmsgpack.unpack(kept[1])
    if s.schema ~= SCHEMA then
      error({ err = 'SCHEMA ' .. as_integer(s.schema or 1) .. ' ' .. SCHEMA })
    end
    s.text = kept[2]
  else
    s = new_state(new_epoch)
    s.text = config_text
  end
  clock(s)
  s.starts = starts and cjson.decode(starts) or {}
  build_meters(s, cjson.decode(s.text))
  s.ttl = math.max(s.ttl, ttl)
  if known_epoch ~= '' and known_epoch ~= s.epoch and known_epoch ~= s.before then
    s.before = known_epoch
    drain(s)
  end
  return s
end

local function save_window(w)
  for _, field in ipairs(w.gone) do
    redis.call('HDEL', KEYS[1], field)
  end
  for i in pairs(w.dirty) do
    if i >= w.head then
      redis.call('HSET', KEYS[1], w.prefix .. i, struct.pack(ENTRY, w.cache[i][1], w.cache[i][2]))
    end
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
  return math.min(math.ceil((ends - s.now + HOUR) / 1000), FOREVER)
end

-- Write all at once; the first write is one that a server short of memory refuses.
local function save(s)
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
  for _, place in ipairs(s.line) do -- they look anew
    place.due = s.now
  end
  return true
end

-- Line: the workers that wait, in order of arrival, for units and slots alike; and who is next.
--
-- A place is a worker, `since` when it stands there, what its first call costs (`call`) and waits for
-- (`bound`), for how many slots it waits (`wanted`) and how many it holds (`held`), `first` since when it
-- has been the first with this call (0: others come first), and when it is `due` to ask again.
-- The rules are those of asyncbucket/stores/store.py; asyncbucket/stores/state.py follows them too.

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

-- Those in `line` in the order of their turns, without those who missed theirs.
local function in_order(s, line, share)
  local order, above = {}, {}
  for _, place in ipairs(line) do
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
  for _, place in ipairs(in_order(s, s.line, share)) do
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
