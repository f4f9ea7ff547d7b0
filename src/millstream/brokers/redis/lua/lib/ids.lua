-- ids.lua: entries' ids in their order, and the answers of XINFO by name.
-- CALL     before(a, b): a lies before b | predecessor(id) | successor(id): the next one that may be, or `id` where only a
--          number too large for a double would tell | named(list): fields by name | future(id): of a time to come
-- Cost     O(1), O(list)
local before, predecessor, successor, named, future
do
  local MAX_SEQ, EXACT_DIGITS = '18446744073709551615', 16
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)

  function before(a, b)
    local a_ms, a_seq = string.match(a, '(%d+)-(%d+)')
    local b_ms, b_seq = string.match(b, '(%d+)-(%d+)')
    if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
    return tonumber(a_seq) < tonumber(b_seq)
  end

  function predecessor(id)
    local ms, seq = string.match(id, '(%d+)-(%d+)')
    if seq ~= '0' and #seq < EXACT_DIGITS then return ms .. '-' .. string.format('%.0f', seq - 1) end
    if ms == '0' then return '0-0' end
    return string.format('%.0f', ms - 1) .. '-' .. MAX_SEQ
  end

  function successor(id)
    local ms, seq = string.match(id, '(%d+)-(%d+)')
    if seq == MAX_SEQ then return string.format('%.0f', ms + 1) .. '-0' end
    if #seq < EXACT_DIGITS then return ms .. '-' .. string.format('%.0f', seq + 1) end
    return id
  end

  function named(list)
    local fields = {}
    for i = 1, #list, 2 do fields[list[i]] = list[i + 1] end
    return fields
  end

  function future(id) return tonumber(string.match(id, '^%d+')) > now end
end
