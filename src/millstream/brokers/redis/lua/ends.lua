-- ends.lua: how much a log has ever held, and where it begins and ends.
-- USES     ids
-- KEYS     log
-- ARGV     none
-- RETURNS  length, entries ever added (nil before Redis 7), the first id (empty without entries), the last id; nothing for
--          what is no log
-- Why      XINFO STREAM answers with the first and the last entry too: of 256 partitions with events of 1 MB half a
--          gigabyte, every few seconds. Here they stay on the server.
-- Cost     two bodies in XINFO STREAM
local found = redis.pcall('XINFO', 'STREAM', KEYS[1])
if found.err then return {} end
local info = named(found)
local first = info['first-entry']
return {info.length, info['entries-added'] or false, first and first[1] or '', info['last-generated-id']}
