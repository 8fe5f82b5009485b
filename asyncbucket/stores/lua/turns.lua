-- Turns: workers whose next call may not start soon, first come, first served.
--
-- Nothing is booked for them while they wait, so that what others give back serves them at once. A
-- place is a worker, when it will ask again by itself, what its next call costs, what that waits for,
-- since when it is the first (0: it is not, or does not know), and the instant for which it was last
-- told to come (0: never). Who is not the first waits to be told;
-- a worker that does not ask when it should is passed over.

local SOON = 5000 -- before it no worker is asked to come again
local SILENT = 2000000

local function turns_prune(s, worker)
  local kept = {}
  for _, place in ipairs(s.turns) do
    if place.ask + SILENT > s.now or place.worker == worker then
      kept[#kept + 1] = place
    end
  end
  s.turns = kept
end

local function turns_of(s, worker)
  for i, place in ipairs(s.turns) do
    if place.worker == worker then
      return place, i
    end
  end
  return nil
end

local function turns_leave(s, worker)
  local _, i = turns_of(s, worker)
  if i then
    table.remove(s.turns, i)
  end
end

-- When a worker whose next call may start at `when` should ask again; nil if it is booked now.
local function turns_wait(s, worker, when)
  local first = s.turns[1]
  if first and first.worker ~= worker then
    return math.max(first.ask, s.now) + 1000000 -- it is told before, when it is the first
  elseif when > s.now + FAR then
    return math.max(s.now + SOON, when - FAR)
  end
  return nil
end

local function turns_enter(s, worker, ask, amounts, bound, since)
  local place = turns_of(s, worker)
  if not place then
    place = { worker = worker, told = 0 }
    table.insert(s.turns, place)
  end
  place.ask, place.amounts, place.bound, place.since = ask, amounts, bound, 0
  if s.turns[1] == place then -- it knows itself when to come
    place.told, place.since = ask, since or math.max(s.now, s.last)
  end
end

-- Since when a worker has been first in line with this call, or nil.
local function turns_since(s, worker, amounts, at)
  local place = turns_of(s, worker)
  if not place or place.since == 0 then
    return nil
  end
  for i, amount in ipairs(place.amounts) do
    if amounts[at + i] ~= amount then
      return nil
    end
  end
  return place.since
end

-- In how long (microseconds) the first should come, if it is a worker that does not know it yet.
local function turns_call(s)
  local place = s.turns[1]
  if not place then
    return nil
  end
  local when = earliest(s, place.amounts, 0, place.since > 0 and place.since or nil)
  local come = math.max(s.now, when - FAR)
  if place.told ~= 0 and come > place.told - SOON then
    return nil
  end
  place.told = math.max(come, 1)
  if place.ask > s.now then -- an overdue worker may be dead, and gets no more time
    place.ask = math.max(come, s.now) + 1000000
  end
  return place.worker, come - s.now
end
