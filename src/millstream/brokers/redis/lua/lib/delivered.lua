-- delivered.lua: how far a group has come. To be used behind `ids`.
-- CALL     delivered(log, group)
-- RETURNS  its last-delivered-id | nil: the log or the group is gone
-- Cost     O(groups)
local function delivered(log, group)
  if redis.call('EXISTS', log) == 0 then return end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
    local fields = named(info)
    if fields.name == group then return fields['last-delivered-id'] end
  end
end
