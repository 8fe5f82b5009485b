-- Meters: what may pass of one limit. As asyncbucket.engine.meters does it, in microseconds.
--
-- A meter `m` is what the config says of a limit; its window `m.w`, and in it its bucket `b`, are what is kept.
-- A window's entries, each a date and units, are numbered from `head` to `tail` - 1. The hash has them in packs, as a
-- field takes a hundred bytes by itself. The newest
-- bookings (`recent`, dated `last`) become an entry when a grain has passed: at `closes`.
--
-- A window that resets by the calendar has no entries, but `starts`: when some periods begin by the wall clock, as
-- a worker last told. `closes` is when its period ends, `opened` when it began.

local PACK = 16 -- entries
local LOWS = 511 -- a bucket remembers so many
local JITTER = 3 -- entries fewer grains apart count as one

local now = 0 -- the server's clock, plus the `offset` by which it has been set back
local offset = 0
local packs = {} -- of entries, by field
local changed, gone = {}, {} -- what fields contain in the end, and those that are deleted then

local function window_new(began)
  return {
    used = 0, last = 0, recent = 0, closes = 0, forgotten = began, head = 0, tail = 0,
    resets = '', opened = NEVER, starts = {},
  }
end

-- The pack of the i-th entry, and where it is there.
local function pack_of(m, i)
  local name = m.prefix .. math.floor(i / PACK)
  if not packs[name] then
    local kept = redis.call('HGET', KEYS[1], name)
    packs[name] = kept and cmsgpack.unpack(kept) or {}
  end
  return packs[name], 2 * (i % PACK) + 1, name
end

local function entry(m, i)
  local pack, at = pack_of(m, i)
  return pack[at], pack[at + 1]
end

local function put(m, i, date, units)
  local pack, at, name = pack_of(m, i)
  pack[at], pack[at + 1], changed[name] = date, units, pack
end

-- Forget the entries before the `to`-th.
local function drop_entries(prefix, w, to)
  local past = math.floor(to / PACK)
  if to == w.tail and to > w.head then
    past = math.ceil(to / PACK)
  end
  for n = math.floor(w.head / PACK), past - 1 do
    local name = prefix .. n
    gone[#gone + 1], packs[name], changed[name] = name, {}, nil
  end
  w.head = to
end

-- Other times of resetting: all counts as booked last.
local function window_set_resets(m, date)
  local w, resets = m.w, m.resets or ''
  if resets ~= w.resets then
    drop_entries(m.prefix, w, w.tail)
    w.resets, w.opened, w.starts, w.recent, w.closes = resets, NEVER, {}, w.used, date
  end
end

-- How many of the starts are not after `wall`.
local function window_period(w, wall)
  local n = 0
  while w.starts[n + 1] and w.starts[n + 1] <= wall do
    n = n + 1
  end
  return n
end

-- When it will have reset so many times, by the wall clock as it is now.
local function window_resets_at(w, times)
  local wall = w.closes - offset
  local n = window_period(w, math.min(wall, w.opened))
  local start = w.starts[n + times] or w.starts[#w.starts] or NEVER
  return w.closes + math.max(0, start - wall)
end

-- Open the period that the wall clock shows, unless it is one that was opened before.
local function window_reset(m, when)
  local w, wall = m.w, when - offset
  local n = window_period(w, wall)
  local start, following = w.starts[n], w.starts[n + 1]
  if start and start > w.opened then
    local owed = math.min(math.max(0, w.used - m.amount), m.amount)
    w.used = w.starts[n - 1] and w.starts[n - 1] > w.opened and 0 or owed
    w.recent, w.forgotten = w.used, when - 1
  end
  w.opened = start or w.opened
  w.closes = following and when + following - wall or when
end

local function window_forget(m, when)
  local w, horizon = m.w, when - m.hold
  if w.resets ~= '' then
    if when >= w.closes then
      window_reset(m, when)
    end
    return
  end
  local head = w.head
  while head < w.tail do
    local date, units = entry(m, head)
    if date > horizon then
      break
    end
    w.forgotten, w.used, head = date, w.used - units, head + 1
  end
  drop_entries(m.prefix, w, head)
  if w.closes > 0 and w.last <= horizon then
    w.forgotten, w.used, w.recent, w.closes = w.last, w.used - w.recent, 0, 0
    if w.b and not m.is_paced and w.b.backlog <= (when - w.b.at) * w.b.q then
      w.b = nil -- all is paid
    end
  end
end

local function window_earliest(m, amount, since)
  local w = m.w
  local over = w.used + amount - m.amount
  if over <= 0 then
    return since
  elseif w.resets ~= '' then
    return math.max(since, window_resets_at(w, over <= m.amount and 1 or 2))
  end
  for i = w.head, w.tail - 1 do
    local date, units = entry(m, i)
    over = over - units
    if over <= 0 then
      return math.max(since, date + m.hold)
    end
  end
  return math.max(since, w.last + m.hold)
end

local function window_book(m, amount, when)
  local w = m.w
  if when >= w.closes then
    window_forget(m, when)
    if w.resets == '' then
      if w.closes > 0 then
        put(m, w.tail, w.last, w.recent)
        w.tail, w.recent = w.tail + 1, 0
      end
      w.closes = when + m.grain
    end
  end
  w.used, w.recent, w.last = w.used + amount, w.recent + amount, when
end

-- The first entry dated `when` or later, or `tail`.
local function window_find(m, when)
  local low, high = m.w.head, m.w.tail
  while low < high do
    local middle = math.floor((low + high) / 2)
    if entry(m, middle) < when then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

-- Give back what was booked at `when`, or, if `amount` is negative, owe more since then.
local function window_unbook(m, amount, when)
  local w = m.w
  if when <= w.forgotten or when > w.last then
    return
  end
  local i = window_find(m, when)
  if i < w.tail then
    local date, units = entry(m, i)
    amount = math.min(amount, units)
    put(m, i, date, units - amount)
  else
    amount = math.min(amount, w.recent)
    w.recent = w.recent - amount
  end
  w.used = w.used - amount
end

-- Bucket: time is counted in ticks, the q-th part of a microsecond; a unit takes p ticks, exactly. An absolute
-- instant in ticks would not fit into a double, so the bucket keeps the `backlog` (ticks until it is full) as it
-- was `at` the microsecond of its last booking.

local function bucket_new(m, began)
  return { p = m.p, q = m.q, at = began, backlog = 0, full_at = began + 1, dates = {}, lows = {} }
end

-- The backlog at `when`; negative if the bucket has been full before.
local function bucket_backlog(b, when)
  return b.backlog - (when - b.at) * b.q
end

local function bucket_earliest(m, amount, since)
  local b, over = m.w.b, (amount - m.burst) * m.p
  local ticks = bucket_backlog(b, since)
  if over > 0 then -- the rest flows in while the caller is first in line
    ticks = math.max(0, ticks)
  end
  return since + math.max(0, math.ceil((ticks + over) / b.q))
end

-- Take `cost` ticks at `shift` ticks before `when`.
local function bucket_add(b, cost, when, shift)
  local start, before = when - math.floor(shift / b.q), bucket_backlog(b, when)
  local low, dates, lows = before + shift, b.dates, b.lows
  b.at = when
  if low <= 0 then
    b.full_at, b.backlog, b.dates, b.lows = start, cost - shift, {}, {}
    return
  end
  b.backlog = before + cost
  if dates[#dates] == start then
    return -- what was booked first, at the same instant, found the lower backlog
  end
  while #lows > 0 and lows[#lows] >= low do
    dates[#dates], lows[#lows] = nil, nil
  end
  dates[#dates + 1], lows[#lows + 1] = start, low
  if #lows > LOWS then -- neighbors become one: the lower low at the later time
    b.dates, b.lows = {}, {}
    for i = 1, #lows - 1, 2 do
      b.dates[#b.dates + 1], b.lows[#b.lows + 1] = dates[i + 1], lows[i]
    end
  end
end

-- Take `amount`; what is above the burst has flowed in before, unless it is a debt that has not earned it.
local function bucket_book(m, amount, when)
  local over = (amount - m.burst) * m.p
  local is_earned = bucket_backlog(m.w.b, when) + over <= 0
  bucket_add(m.w.b, amount * m.p, when, is_earned and math.max(0, over) or 0)
end

-- Give back at most the lowest backlog since `when`: what flowed into a full bucket is lost.
local function bucket_unbook(m, amount, when, left)
  local b, room = m.w.b, m.burst * m.p
  if b.full_at > when then
    return
  end
  local dates, lows, later = b.dates, b.lows, 1
  while later <= #dates and dates[later] <= when do
    later = later + 1
  end
  -- A debt found the bucket full just then, or neither full nor empty: it has earned nothing.
  local as_debt = b.full_at == when or (dates[later - 1] == when and lows[later - 1] ~= room)
  -- A part, or something was booked since: what was earned by standing first stays.
  if not as_debt and (left > 0 or bucket_backlog(b, when) ~= room) then
    amount = math.min(left + amount, m.burst) - math.min(left, m.burst)
  end
  local back = math.min(amount * m.p, lows[later] or NEVER)
  b.dates, b.lows, b.backlog = {}, {}, b.backlog - back
  for i = 1, #dates do -- lows from before that are now above a later one are none any more
    if i >= later or not lows[later] or lows[i] < lows[later] - back then
      b.dates[#b.dates + 1], b.lows[#b.lows + 1] = dates[i], i < later and lows[i] or lows[i] - back
    end
  end
end

-- Go on at another rate: the units missing at `when` stay missing; older refunds are forgone.
local function bucket_reshape(b, p, q, when)
  if b.p ~= p or b.q ~= q then
    local missing = math.max(0, bucket_backlog(b, when)) / b.p
    b.backlog = missing > 0 and math.ceil(missing * p) or 0
    b.at, b.full_at, b.dates, b.lows = when, when, {}, {}
  end
  b.p, b.q = p, q
end

-- What it allows from `since` on.
local function meter_earliest(m, amount, since)
  local first = window_earliest(m, amount, since)
  return m.w.b and math.max(first, bucket_earliest(m, amount, since)) or first
end

-- Pace what comes by a bucket that holds the limit, until it has paid a debt of `amount`.
local function meter_repay(m, amount, when)
  window_forget(m, when)
  local w = m.w
  if w.used <= m.amount then
    return
  end
  local spared = math.max(0, w.used - amount - m.amount) -- booked while the limit was higher
  local function owe(date, units)
    w.b = w.b or bucket_new(m, date) -- no time before has earned anything
    bucket_book(m, math.max(0, units - spared), date)
    spared = math.max(0, spared - units)
  end
  for i = w.head, w.tail - 1 do
    owe(entry(m, i))
  end
  owe(w.last, w.recent)
end

-- Take `amount`, of a call that may pass, or owed.
local function meter_book(m, amount, when)
  if m.w.b then
    bucket_book(m, amount, when)
  end
  window_book(m, amount, when)
  if m.p and not m.w.b and m.w.used > m.amount then
    meter_repay(m, amount, when)
  end
end

-- Owe what was taken at `when`, by which it fills the limit, but no further.
local function meter_fill(m, amount, when, date)
  local w, b = m.w, m.w.b
  if b then
    local room = math.floor((m.burst * m.p - math.max(0, bucket_backlog(b, date))) / m.p)
    if room > 0 then
      bucket_book(m, math.min(amount, room), date)
    end
  end
  window_forget(m, date)
  amount = math.min(amount, m.amount - w.used)
  if amount <= 0 then
    return
  elseif w.resets ~= '' or when > w.last then
    window_book(m, amount, math.max(when, w.last))
    return
  end
  local i = window_find(m, when)
  local following = i < w.tail and entry(m, i) or w.last
  if when <= w.forgotten or following - when <= JITTER * m.grain then
    window_unbook(m, -amount, when)
    return
  end
  for n = w.tail - 1, i, -1 do
    put(m, n + 1, entry(m, n))
  end
  put(m, i, when, amount)
  w.tail, w.used = w.tail + 1, w.used + amount
end

local function meter_unbook(m, amount, when, left)
  window_unbook(m, amount, when)
  if m.w.b then
    bucket_unbook(m, amount, when, left)
  end
end
