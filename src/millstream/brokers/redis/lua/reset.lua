-- reset.lua: move a group without order to another place, with all partitions of its unit in one step.
-- USES     ids
-- KEYS     live, the fence of each member, then log, due, note, stats, meta of each partition
-- ARGV     group, start: '$', or the id behind which it goes on; how many members; their names; then per partition what
--          it has done so far, or '', and how many events it has given up
-- RETURNS  OK | AGAIN: other members than those given
-- Why      XGROUP SETID alone would let a read tear entries out of the pending lists of living consumers, and two would
--          run the same event. So all fences go first, and nothing is pending any more.
--          What is done is counted from `start` on: what was done before is kept beside it.
-- Cost     O(pending)
local group, start, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
local live = KEYS[1]
if redis.call('ZCARD', live) ~= count then return 'AGAIN' end
for i = 1, count do
  if not redis.call('ZSCORE', live, ARGV[3 + i]) then return 'AGAIN' end
end
redis.call('DEL', unpack(KEYS, 1, count + 1))

local arg = 4 + count
for i = count + 2, #KEYS, 5 do
  local log, due, note, stats, meta = unpack(KEYS, i, i + 4)
  local info = {['last-generated-id'] = '0-0', ['entries-added'] = 0, length = 0}
  if redis.call('EXISTS', log) == 1 then
    info = named(redis.call('XINFO', 'STREAM', log))
    redis.call('XGROUP', 'DESTROY', log, group)
  end
  local last, added = info['last-generated-id'], info['entries-added']
  local first = info['first-entry'] and info['first-entry'][1]
  local id = start == '$' and last or start
  local read = ''
  if added and not before(id, last) and not future(id) then
    read = string.format('%.0f', added)
  elseif added and (not first or before(id, first)) then
    read = string.format('%.0f', added - info.length)
  end
  redis.call('XGROUP', 'CREATE', log, group, id, 'MKSTREAM', unpack(read ~= '' and {'ENTRIESREAD', read} or {}))
  redis.call('DEL', due, note)
  redis.call('HSET', meta, 'start:' .. group, id .. ' ' .. read, 'low:' .. group, id .. ' ' .. read)
  redis.call('HSET', stats, 'done', ARGV[arg], 'given', ARGV[arg + 1])
  arg = arg + 2
end
return 'OK'
