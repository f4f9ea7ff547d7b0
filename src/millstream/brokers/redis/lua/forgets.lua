-- forgets.lua: does this server forget, behind a gap, how many entries a group has read?
-- KEYS     a key for this alone
-- ARGV     none
-- RETURNS  1 | 0
-- Why      Features are tried, not told by the version. Where it cannot be tried (maxmemory), it may.
-- Cost     O(1)
local key = KEYS[1]
redis.call('DEL', key)
local function tried()
  for n = 1, 3 do redis.call('XADD', key, n .. '-0', 'n', n) end
  redis.call('XGROUP', 'CREATE', key, 'g', '0', 'ENTRIESREAD', 0)
  redis.call('XTRIM', key, 'MAXLEN', 1)
  redis.call('XREADGROUP', 'GROUP', 'g', 'c', 'STREAMS', key, '>')
  local info = redis.call('XINFO', 'GROUPS', key)[1]
  for i = 1, #info, 2 do
    if info[i] == 'entries-read' then return info[i + 1] == 3 end
  end
end
local ran, forgets = pcall(tried)
redis.call('DEL', key)
return (not ran or forgets) and 1 or 0
