-- ripen.lua: publish what was kept aside in one partition and has fallen due.
-- USES     store
-- KEYS     log, later, ids0, ids1, ids2, meta; with a ceiling the logs of all partitions
-- ARGV     most events, most bytes in one call; the policy in six numbers, see `store`
-- RETURNS  how many were published, when the next one is due ('' when there is none), the refusal of the next one ('' if none)
-- Why      Each goes from one place to the other in one step, so several who tend at once publish each once, and none is
--          lost. Ids were looked at when they were kept aside; who repeats one from now on learns the position.
--          What maxmemory or the ceiling refuses waits; it is the first of the call, or nothing is refused any more.
--          Hashes of ids that nobody needs any more are unlinked here: their expiry would stop the server.
-- Cost     O(events · log kept aside); 200 small ones 1.2 ms
local later, ids = KEYS[2], {KEYS[3], KEYS[4], KEYS[5]}
local max_events, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local policy = policy_at(3)
local AT_ONCE = 8

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local published, refused = 0, ''

local function known_at(id, offset)
  for _, key in ipairs(ids) do
    if redis.call('HGET', key, id) == 'later' then redis.call('HSET', key, id, offset) end
  end
end

local function publish(members)
  for _, member in ipairs(members) do
    local fields = cmsgpack.unpack(string.sub(member, 17))
    local offset = store(1, policy, fields, nil, true)
    if type(offset) == 'table' then
      refused = offset.err
      return false
    end
    redis.call('ZREM', later, member)
    known_at(fields[1], offset)
    published, max_bytes = published + 1, max_bytes - #member
    if published >= max_events or max_bytes <= 0 then return false end
  end
  return #members == AT_ONCE
end

repeat
  local more = publish(redis.call('ZRANGEBYSCORE', later, '-inf', string.format('%.0f', now), 'LIMIT', 0, AT_ONCE))
until not more
for _, key in ipairs(ids) do
  local begun = redis.call('HGET', key, '')
  if begun and now - begun >= 3 * math.ceil(policy.dedupe_ms / 2) then redis.call('UNLINK', key) end
end
return {published, redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')[2] or '', refused}
