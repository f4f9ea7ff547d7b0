-- train.lua: store a dictionary, and the policy that names it.
-- KEYS     dictionaries, stream's meta
-- ARGV     number, content, most dictionaries, the policy as it was read, the policy as it is to be
-- RETURNS  OK | AGAIN: the policy is another one by now | TAKEN: other content has this number | FULL: there are so many
--          already | UNKNOWN: none has this number, and no content is given; but for OK nothing is written
-- Why      An event must never be written with a dictionary that is not there, or is another one for its reader; and
--          somebody may change the policy at the same time.
-- Cost     O(content)
local dictionaries, meta = KEYS[1], KEYS[2]
local number, content = ARGV[1], ARGV[2]

if (redis.call('HGET', meta, 'policy') or '') ~= ARGV[4] then return 'AGAIN' end
if number ~= '0' then
  local there = redis.call('HGET', dictionaries, number)
  if not there then
    if content == '' then return 'UNKNOWN' end
    if redis.call('HLEN', dictionaries) >= tonumber(ARGV[3]) then return 'FULL' end
    redis.call('HSET', dictionaries, number, content)
  elseif content ~= '' and content ~= there then
    return 'TAKEN'
  end
end
redis.call('HSET', meta, 'policy', ARGV[5])
return 'OK'
