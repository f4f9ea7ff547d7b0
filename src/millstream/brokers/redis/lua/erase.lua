-- erase.lua: delete a stream of which no group is left.
-- KEYS     streams, stream's meta, slots, dictionaries; then log, later, ids0, ids1, ids2, meta of each partition
-- ARGV     stream
-- RETURNS  OK | AGAIN: there is a group
-- Why      A group is deleted with its own keys, see forget.lua. One that was made meanwhile would leave them behind.
-- Cost     O(partitions); events and ids are freed in the background
for i = 5, #KEYS, 6 do
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[i])
  if not groups.err and #groups > 0 then return 'AGAIN' end
end
redis.call('SREM', KEYS[1], ARGV[1])
redis.call('UNLINK', unpack(KEYS, 2))
return 'OK'
