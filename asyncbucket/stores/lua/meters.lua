-- Window: at most `amount` units in every window. As asyncbucket.engine.meters.Window does it.
--
-- Entries lie in fields of the hash, numbered from `head` to `tail` - 1, each a date and units. They
-- are read when needed and written at the end: a batch touches few of them.
--
-- A window that resets by the calendar has `starts`, the starts of some periods by the wall clock, as a worker
-- last told them: it keeps no fields, and `closes` is when its period ends. `opened` is that period's start.

local ENTRY = '<dd'
local LOWS = 511 -- a bucket remembers so many
local JITTER = 3 -- entries fewer grains apart count as one

local function window_new(began)
  return {
    used = 0, last = 0, recent = 0, closes = 0, forgotten = began, head = 0, tail = 0,
    resets = '', opened = NEVER, starts = {},
  }
end

-- Other times of resetting: all counts as booked last.
local function window_set_resets(w, resets, now)
  if resets ~= w.resets then
    for i = w.head, w.tail - 1 do
      w.gone[#w.gone + 1] = w.prefix .. i
    end
    w.resets, w.opened, w.starts = resets, NEVER, {}
    w.head, w.recent, w.closes = w.tail, w.used, now
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

-- Whether the starts say enough about the period that the wall clock shows: two resets before and after it.
local function window_knows(w, wall)
  local n = window_period(w, wall)
  return n > 1 and n < #w.starts - 1
end

-- When it will have reset so many times, by the wall clock as it is now.
local function window_resets_at(w, times)
  local wall = w.closes - w.offset
  local n = window_period(w, math.min(wall, w.opened))
  local start = w.starts[n + times] or w.starts[#w.starts] or NEVER
  return w.closes + math.max(0, start - wall)
end

-- Open the period that the wall clock shows, unless it is one that was opened before.
local function window_reset(w, now)
  local wall = now - w.offset
  local n = window_period(w, wall)
  local start, following = w.starts[n], w.starts[n + 1]
  if start and start > w.opened then
    local owed = math.min(math.max(0, w.used - w.amount), w.amount)
    w.used = w.starts[n - 1] and w.starts[n - 1] > w.opened and 0 or owed
    w.recent, w.forgotten = w.used, now - 1
  end
  w.opened = start or w.opened
  w.closes = following and now + following - wall or now
end

local function window_entry(w, i)
  local entry = w.cache[i]
  if not entry then
    local stop = math.min(i + 15, w.tail - 1)
    local fields = {}
    for n = i, stop do
      fields[#fields + 1] = w.prefix .. n
    end
    local values = redis.call('HMGET', KEYS[1], unpack(fields))
    for n = i, stop do
      if not w.cache[n] then
        local date, units = struct.unpack(ENTRY, values[n - i + 1])
        w.cache[n] = { date, units }
      end
    end
    entry = w.cache[i]
  end
  return entry
end

-- The first entry dated `when` or later, or `tail`.
local function window_find(w, when)
  local low, high = w.head, w.tail
  while low < high do
    local middle = math.floor((low + high) / 2)
    if window_entry(w, middle)[1] < when then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

local function window_forget(w, now)
  if w.resets ~= '' then
    if now >= w.closes then
      window_reset(w, now)
    end
    return
  end
  local horizon = now - w.hold
  while w.head < w.tail do
    local entry = window_entry(w, w.head)
    if entry[1] > horizon then
      break
    end
    w.forgotten = entry[1]
    w.used = w.used - entry[2]
    w.cache[w.head] = nil
    w.gone[#w.gone + 1] = w.prefix .. w.head
    w.head = w.head + 1
  end
  if w.closes > 0 and w.last <= horizon then
    w.forgotten = w.last
    w.used = w.used - w.recent
    w.recent = 0
    w.closes = 0
  end
end

local function window_earliest(w, amount, since)
  local over = w.used + amount - w.amount
  if over <= 0 then
    return since
  end
  if w.resets ~= '' then
    return math.max(since, window_resets_at(w, over <= w.amount and 1 or 2))
  end
  for i = w.head, w.tail - 1 do
    local entry = window_entry(w, i)
    over = over - entry[2]
    if over <= 0 then
      return math.max(since, entry[1] + w.hold)
    end
  end
  return math.max(since, w.last + w.hold)
end

local function window_book(w, amount, when)
  if when >= w.closes then
    window_forget(w, when)
    if w.resets == '' then
      if w.closes > 0 then
        w.cache[w.tail] = { w.last, w.recent }
        w.dirty[w.tail] = true
        w.tail = w.tail + 1
        w.recent = 0
      end
      w.closes = when + w.grain
    end
  end
  w.used = w.used + amount
  w.recent = w.recent + amount
  w.last = when
end

local function window_unbook(w, amount, when)
  if when <= w.forgotten or when > w.last then
    return
  end
  local back
  local i = window_find(w, when)
  if i < w.tail then
    local entry = window_entry(w, i)
    back = math.min(amount, entry[2])
    entry[2] = entry[2] - back
    w.dirty[i] = true
  else
    back = math.min(amount, w.recent)
    w.recent = w.recent - back
  end
  w.used = w.used - back
end

-- Owe what was taken at `when`: it counts in an entry of about that date, unless the window has passed that.
local function window_fill(w, amount, when)
  if amount <= 0 then
    return
  elseif w.resets ~= '' or when > w.last then
    window_book(w, amount, math.max(when, w.last))
  elseif when > w.forgotten then
    local i = window_find(w, when)
    local following = i < w.tail and window_entry(w, i)[1] or w.last
    if following - when <= JITTER * w.grain then
      window_unbook(w, -amount, when)
      return
    end
    for n = w.tail - 1, i, -1 do
      w.cache[n + 1], w.dirty[n + 1] = window_entry(w, n), true
    end
    w.cache[i], w.dirty[i] = { when, amount }, true
    w.tail, w.used = w.tail + 1, w.used + amount
  end
end

local function window_available(w, now)
  window_forget(w, now)
  return w.amount - w.used
end

-- Bucket: at most `burst` units at once, refilled steadily. As asyncbucket.engine.meters.Bucket does it.
--
-- Time is counted in ticks, the q-th part of a microsecond: a unit takes p ticks, exactly. An
-- absolute instant in ticks would not fit into a double, so the bucket keeps the `backlog` (ticks
-- until it is full) as it was `at` the microsecond of its last booking.

local function bucket_new(began)
  return { at = began, backlog = 0, full_at = began + 1, dates = {}, lows = {} }
end

-- The backlog at `when`; negative if the bucket has been full before.
local function bucket_backlog(b, when)
  return b.backlog - (when - b.at) * b.q
end

local function bucket_earliest(b, amount, since)
  local over = (amount - b.burst) * b.p
  local ticks = bucket_backlog(b, since)
  if over > 0 and ticks < 0 then -- the rest flows in while the caller is first in line
    ticks = 0
  end
  ticks = ticks + over
  if ticks <= 0 then
    return since
  end
  return since + math.ceil(ticks / b.q)
end

-- Take `cost` ticks at `shift` ticks before `when`.
local function bucket_add(b, cost, when, shift)
  local start = when - math.floor(shift / b.q)
  local now = bucket_backlog(b, when)
  local low = now + shift
  b.at = when
  if low <= 0 then
    b.full_at = start
    b.backlog = cost - shift
    b.dates, b.lows = {}, {}
    return
  end
  b.backlog = now + cost
  local dates, lows = b.dates, b.lows
  local n = #dates
  if n > 0 then
    if dates[n] == start then
      return -- what was booked first, at the same instant, found the lower backlog
    end
    while n > 0 and lows[n] >= low do
      dates[n], lows[n] = nil, nil
      n = n - 1
    end
  end
  dates[n + 1], lows[n + 1] = start, low
  if n + 1 > LOWS then -- neighbours become one: the lower low at the later time
    local fewer_dates, fewer_lows = {}, {}
    for i = 1, n, 2 do
      fewer_dates[#fewer_dates + 1] = dates[i + 1]
      fewer_lows[#fewer_lows + 1] = lows[i]
    end
    b.dates, b.lows = fewer_dates, fewer_lows
  end
end

local function bucket_book(b, amount, when)
  local cost = amount * b.p
  bucket_add(b, cost, when, math.max(0, cost - b.room))
end

local function bucket_owe(b, amount, when)
  if bucket_backlog(b, when) + (amount - b.burst) * b.p <= 0 then
    bucket_book(b, amount, when)
  else
    bucket_add(b, amount * b.p, when, 0)
  end
end

-- Give back at most the lowest backlog since `when`: what flowed into a full bucket is lost.
local function bucket_unbook(b, amount, when, left)
  if b.full_at > when then
    return
  end
  local dates, lows = b.dates, b.lows
  local later = 1
  while later <= #dates and dates[later] <= when do
    later = later + 1
  end
  -- A debt found the bucket full just then, or neither full nor empty: it has earned nothing.
  local as_debt = b.full_at == when or (dates[later - 1] == when and lows[later - 1] ~= b.room)
  -- A part, or something was booked since: what was earned by standing first stays.
  if not as_debt and (left > 0 or bucket_backlog(b, when) ~= b.room) then
    amount = math.min(left + amount, b.burst) - math.min(left, b.burst)
  end
  local back = amount * b.p
  if lows[later] then
    back = math.min(back, lows[later])
  end
  local first = later
  if lows[later] then -- lows from before that are now above a later one are none any more
    first = 1
    while first < later and lows[first] < lows[later] - back do
      first = first + 1
    end
  end
  local kept_dates, kept_lows = {}, {}
  for i = 1, #dates do
    if i < first then
      kept_dates[#kept_dates + 1], kept_lows[#kept_lows + 1] = dates[i], lows[i]
    elseif i >= later then
      kept_dates[#kept_dates + 1], kept_lows[#kept_lows + 1] = dates[i], lows[i] - back
    end
  end
  b.dates, b.lows = kept_dates, kept_lows
  b.backlog = b.backlog - back
end

-- Go on at another rate: the units missing at `now` stay missing; older refunds are forgone.
local function bucket_reshape(b, p, q, now)
  local missing = math.max(0, bucket_backlog(b, now)) / b.p
  b.backlog = missing > 0 and math.ceil(missing * p) or 0
  b.at, b.full_at = now, now
  b.dates, b.lows = {}, {}
end

local function bucket_available(b, now)
  return math.floor((b.room - math.max(0, bucket_backlog(b, now))) / b.p)
end
