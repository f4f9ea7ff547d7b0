-- forget.lua: delete a group with all that it has.
-- KEYS     live, tick, the fence of each member; then log, due, note, dead, stats, lease, parked, parkinfo, meta of each
--          partition; then the list of each parked key
-- ARGV     group, how many members, their names, how many partitions
-- RETURNS  OK | AGAIN: other members or parked keys than those given
-- Why      All of it in one step, so that nobody finds half of a group.
-- Cost     O(all that is deleted); dead letters are freed in the background
local group, members = ARGV[1], tonumber(ARGV[2])
local partitions = tonumber(ARGV[3 + members])
if redis.call('ZCARD', KEYS[1]) ~= members then return 'AGAIN' end
for i = 1, members do
  if not redis.call('ZSCORE', KEYS[1], ARGV[2 + i]) then return 'AGAIN' end
end
local begin, parked = 2 + members, 0
for i = 0, partitions - 1 do parked = parked + redis.call('ZCARD', KEYS[begin + 9 * i + 7]) end
if parked ~= #KEYS - begin - 9 * partitions then return 'AGAIN' end
for i, key in ipairs(KEYS) do
  local which = (i - begin - 1) % 9
  local is_log = i > begin and i <= begin + 9 * partitions and which == 0
  local is_meta = i > begin and i <= begin + 9 * partitions and which == 8
  if is_log then
    redis.pcall('XGROUP', 'DESTROY', key, group)
  elseif is_meta then
    for _, name in ipairs({'mode:', 'owner:', 'start:', 'low:', 'seen:', 'entered:', 'told:', 'announced:'}) do
      redis.call('HDEL', key, name .. group)
    end
  else
    redis.call('UNLINK', key)
  end
end
return 'OK'
