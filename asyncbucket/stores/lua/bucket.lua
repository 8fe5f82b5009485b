-- Bucket: at most `burst` units at once, refilled steadily. As asyncbucket.meters.Bucket does it.
--
-- Time is counted in ticks, the q-th part of a microsecond: a unit takes p ticks, exactly. An
-- absolute instant in ticks would not fit into a double, so the bucket keeps the `backlog` (ticks
-- until it is full) as it was `at` the microsecond of its last booking.

local LOWS = 511

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
