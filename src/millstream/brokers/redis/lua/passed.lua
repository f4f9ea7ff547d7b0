-- passed.lua: count what a read without order has passed over, where the server forgets that.
-- USES     ids
-- KEYS     log, stats
-- ARGV     group, first id that the read brought, how many it brought, how many entries the group had read before
-- RETURNS  how many are lost
-- Why      Behind a gap the first entry that is read is the first one of the log; so many are gone as were added before it and
--          not read. A server that goes on counting what it hands out finds that at the end, see losses.lua: not here.
--          Only who sent the read can tell, since it alone looked right before it; so nobody counts this twice.
-- Cost     O(groups), and two bodies
local log, stats = KEYS[1], KEYS[2]
local group, first, count, read = unpack(ARGV)
if redis.call('EXISTS', log) == 0 then return 0 end
local stream = named(redis.call('XINFO', 'STREAM', log))
if not stream['entries-added'] or not stream['first-entry'] or stream['first-entry'][1] ~= first then return 0 end
local removed = stream['entries-added'] - stream.length
local lost = removed - read
for _, info in ipairs(redis.call('XINFO', 'GROUPS', log)) do
  local fields = named(info)
  if fields.name == group and (fields['entries-read'] or 0) < removed + count then return 0 end
end
if lost <= 0 then return 0 end
redis.call('XACK', log, group, '0-1')
redis.call('HINCRBY', stats, 'lost', string.format('%.0f', lost))
return lost
