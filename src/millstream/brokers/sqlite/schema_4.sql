-- What schema version 4 adds: packs. A new file gets it right behind `schema_3.sql`, an older one when it is opened.
--
-- A pack is one event here, and has one place. Its own events are numbered: `part` is one such number, `left` and `given` are
-- several, a space in between. All of them are NULL where there is no pack.

ALTER TABLE pending ADD COLUMN left TEXT;          -- of a pack: those of its events that are left; NULL: all
ALTER TABLE pending ADD COLUMN given TEXT;         -- those that people gave back meanwhile: left too from the next claim on

ALTER TABLE parked ADD COLUMN left TEXT;
ALTER TABLE parked ADD COLUMN part INTEGER;        -- of an event of a pack, which stands here alone

ALTER TABLE dead ADD COLUMN part INTEGER;
