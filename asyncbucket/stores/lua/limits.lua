-- Limits: when a call suits all of them.

local PAUSED = -1

-- The first instant from now and the last start on that suits all limits, and the resource that binds.
-- `amounts` lie behind each other in the order of resources, those of the call from `at` + 1 on. A call
-- above a burst earns what is above it while it is first in line: `since` when, if not since now.
local function earliest(s, amounts, at, since)
  local when, bound = math.max(s.now, s.last), 0
  since = since or when
  for _, m in ipairs(s.meters) do
    local amount = amounts[at + m.resource]
    if amount > 0 then
      local first = window_earliest(m.window, amount, since)
      if m.bucket then
        first = math.max(first, bucket_earliest(m.bucket, amount, since))
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
