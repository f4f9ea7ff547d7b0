-- parts.lua: which events of a pack are left, by their numbers: `0,3`, in the hash `note` under `*<id>`. Without it all are.
-- CALL     handed(note, id, left): `left` as it is kept, or false; what is left of a pack that is handed out now, nil for all
--          rejoined(note, id): numbers of those that were given back while others were at work, nil for none
-- Why      Who holds a pack finishes what was left of it when it was handed out, and no more. What is given back meanwhile, see
--          again.lua, is marked, `0,+2`: it stays when the others are finished. Handing out takes the mark away.
-- Cost     O(bytes of the numbers)
local function handed(note, id, left)
  if not left then return end
  local unmarked, marks = string.gsub(left, '+', '')
  if marks > 0 then redis.call('HSET', note, '*' .. id, unmarked) end
  return unmarked
end

local function rejoined(note, id)
  local found = {}
  for part in string.gmatch(redis.call('HGET', note, '*' .. id) or '', '%+(%d+)') do found[#found + 1] = part end
  return #found > 0 and table.concat(found, ',') or nil
end
