-- What schema version 3 adds: policies, and what they need. A new file gets it right behind `schema_2.sql`, an older one when
-- it is opened.
--
-- What retention removes leaves free pages, which SQLite uses again for what comes next: the file does not shrink, and need
-- not grow. VACUUM would hold up everybody, and auto_vacuum cannot be turned on later without it.

ALTER TABLE stream ADD COLUMN policy TEXT;                         -- JSON; NULL: nothing was asked for
ALTER TABLE stream ADD COLUMN repeats INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stream ADD COLUMN trimmed INTEGER NOT NULL DEFAULT 0;  -- events that retention has removed
ALTER TABLE stream ADD COLUMN delayed INTEGER NOT NULL DEFAULT 0;  -- rows in `delayed` now
ALTER TABLE stream ADD COLUMN pinned TEXT NOT NULL DEFAULT '';     -- `Tended.pinned_by` of the last round, for who is refused

ALTER TABLE log ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;        -- all events up to this sequence number are gone
ALTER TABLE log ADD COLUMN ids INTEGER NOT NULL DEFAULT 0;         -- rows in `remembered` now

ALTER TABLE grp ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE grp ADD COLUMN told INTEGER NOT NULL DEFAULT 0;        -- of the lost ones, those that `tend` has told
ALTER TABLE grp ADD COLUMN seen_ms INTEGER NOT NULL DEFAULT 0;     -- when a member beat last, or the group was made
ALTER TABLE grp ADD COLUMN announced_ms INTEGER NOT NULL DEFAULT 0; -- when it was found silent for long; 0: it is not
UPDATE grp SET seen_ms = strftime('%s', 'now') * 1000;             -- nobody wrote it down before: as if born today

ALTER TABLE lease ADD COLUMN skipped INTEGER NOT NULL DEFAULT 0;   -- events of this epoch that its owner found gone

CREATE TABLE remembered (                          -- ids that must not be stored again, of streams that ask for it
    log   INTEGER NOT NULL,
    id    TEXT NOT NULL,
    seq   INTEGER NOT NULL,                        -- of the first event with this id; 0 until it is due
    at_ms INTEGER NOT NULL,
    PRIMARY KEY (log, id)
) WITHOUT ROWID;
CREATE INDEX remembered_by_time ON remembered (log, at_ms);

CREATE TABLE delayed (                             -- whole events that are not due yet
    id       INTEGER PRIMARY KEY,                  -- their order, of those that are due at one time
    log      INTEGER NOT NULL,
    stream   INTEGER NOT NULL,
    due_ms   INTEGER NOT NULL,
    event_id TEXT NOT NULL,
    type     TEXT NOT NULL,
    source   TEXT NOT NULL,
    time_ms  INTEGER NOT NULL,                     -- 0 where the publisher gave none
    subject  TEXT,
    headers  BLOB NOT NULL,
    data     BLOB NOT NULL
);
CREATE INDEX delayed_by_due ON delayed (stream, due_ms);

CREATE TABLE slot (                                -- the last slot of each schedule that publishes to a stream
    stream   INTEGER NOT NULL,
    schedule TEXT NOT NULL,
    at_ms    INTEGER NOT NULL,
    PRIMARY KEY (stream, schedule)
) WITHOUT ROWID;

CREATE INDEX dead_by_row ON dead (grp, row);       -- the oldest one keeps its event, which a replay needs
