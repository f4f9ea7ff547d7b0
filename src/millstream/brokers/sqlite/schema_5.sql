-- What schema version 5 adds: dictionaries. A new file gets it right behind `schema_4.sql`, an older one when it is opened.

CREATE TABLE dictionary (                          -- never changed: an event that was written with one needs it to be read
    stream  INTEGER NOT NULL,
    number  INTEGER NOT NULL,                      -- by which the event names it
    content BLOB NOT NULL,
    PRIMARY KEY (stream, number)
);
