/* How fast can Redis be asked? The same work as Millstream's, by hiredis alone: what no client of one process passes.
 *
 *     cc -O2 -std=c11 -Wall -Wextra -pthread -o build/engine benchmarks/engine.c -lhiredis      (libhiredis-dev)
 *     build/engine MODE [-h host] [-p port] [-n events] [-s size] [-k streams] [-b batch] [-a ahead] [-r rate]
 *                       [-x prefix]
 *
 *   publish  XADD, `batch` of them in one write; `ahead` batches are written before the replies to the first are read
 *   consume  XREADGROUP of `batch` entries, every field looked at; their XACK and the next XREADGROUP leave in one
 *            write, and `ahead` reads are under way meanwhile. The stream is filled beforehand, which is not measured
 *   both     the two at once: two threads, two connections
 *   latency  one XADD at a time, `rate` a second; a second thread is blocked in XREADGROUP: from call to wake-up
 *
 * An entry has the seven fields of an event without a key, and `size` bytes of JSON in `data`. Events go round the
 * streams, which are named PREFIX:0 and so on, deleted before and after. One JSON object is printed: `seconds` and
 * `rate` by the clock; `client_us` and `server_us` are CPU time per event, which a busy machine changes less. Nothing
 * is printed, and the exit code is 1, unless every event came exactly once and none is left pending. */

#define _GNU_SOURCE
#include <hiredis/hiredis.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { FIELDS = 7, ID_CHARS = 21, NUMBER_AT = 10, NUMBER_CHARS = 10, MAX_STREAMS = 1024, KEY_CHARS = 96 };
enum { MIN_BYTES = 64, MAX_BYTES = 1048576, MAX_BATCH = 10000, MAX_AHEAD = 16, BLOCK_MS = 5000 };

static const char *host = "127.0.0.1", *prefix = "engine", *mode;
static int port = 6379;
static size_t events = 100000, size = 200, streams = 1, batch = 100, ahead = 1, rate = 500;
static char keys[MAX_STREAMS][KEY_CHARS];
static unsigned char *times_seen;  /* by number of the event */
static double *called_at, *took;   /* latency: by number */

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("engine: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* --- one connection ---------------------------------------------------------------------------------------------- */

static redisContext *connect_to_server(void) {
    redisContext *link = redisConnect(host, port);
    if (link == NULL || link->err) fail("%s:%d: %s", host, port, link ? link->errstr : "out of memory");
    return link;
}

static redisReply *next_reply(redisContext *link) {
    void *reply;
    if (redisGetReply(link, &reply) != REDIS_OK) fail("connection: %s", link->errstr);
    if (((redisReply *)reply)->type == REDIS_REPLY_ERROR) fail("server: %s", ((redisReply *)reply)->str);
    return reply;
}

static void flush(redisContext *link) {
    for (int done = 0; !done;)
        if (redisBufferWrite(link, &done) != REDIS_OK) fail("connection: %s", link->errstr);
}

/* A rare command: its answer as a number. */
static long long ask(redisContext *link, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    redisvAppendCommand(link, format, arguments);
    va_end(arguments);
    redisReply *reply = next_reply(link);
    bool summary = reply->type == REDIS_REPLY_ARRAY && reply->elements; /* XPENDING begins with its count */
    long long answer = summary ? reply->element[0]->integer : reply->integer;
    freeReplyObject(reply);
    return answer;
}

static double server_cpu_s(redisContext *link) {
    double total = 0;
    redisReply *reply = redisCommand(link, "INFO cpu");
    if (reply == NULL || reply->type != REDIS_REPLY_STRING) fail("INFO cpu: no answer");
    for (const char *name, *names[] = {"used_cpu_sys:", "used_cpu_user:", NULL}, **at = names; (name = *at); at++) {
        const char *found = strstr(reply->str, name);
        total += found ? atof(found + strlen(name)) : 0;
    }
    freeReplyObject(reply);
    return total;
}

static double client_cpu_s(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

/* --- an event ---------------------------------------------------------------------------------------------------- */

static const char *const names[FIELDS] = {"id", "type", "source", "time", "subject", "headers", "data"};

/* An XADD whose arguments stay where they are: only the key, the id and the number in `data` change. */
struct command {
    const char *word[3 + 2 * FIELDS];
    size_t length[3 + 2 * FIELDS];
    char id[ID_CHARS + 1];
    char *data;
};

static void set_word(struct command *command, int at, const char *word) {
    command->word[at] = word;
    command->length[at] = strlen(word);
}

static void make_command(struct command *command) {
    const char *values[FIELDS] = {command->id, "bench.sale", "bench", "", "", "", NULL};
    memset(command->id, '0', ID_CHARS);
    command->id[ID_CHARS] = 0;
    command->data = malloc(size + 1);
    int head = sprintf(command->data, "{\"number\":%*d,\"customer\":\"c-000731\",\"remark\":\"", NUMBER_CHARS, 0);
    memset(command->data + head, '-', size - (size_t)head);
    strcpy(command->data + size - 2, "\"}");
    values[FIELDS - 1] = command->data;
    set_word(command, 0, "XADD");
    set_word(command, 2, "*");
    for (int field = 0; field < FIELDS; field++) {
        set_word(command, 3 + 2 * field, names[field]);
        set_word(command, 4 + 2 * field, values[field]);
    }
}

/* Digits before `end`; what stood before them stays, and is blank or zero since numbers only grow. */
static void put_number(char *end, size_t number) {
    do *--end = (char)('0' + number % 10);
    while (number /= 10);
}

static void append_xadd(redisContext *link, struct command *command, size_t number) {
    set_word(command, 1, keys[number % streams]);
    put_number(command->id + ID_CHARS, number);
    put_number(command->data + NUMBER_AT + NUMBER_CHARS, number);
    redisAppendCommandArgv(link, 3 + 2 * FIELDS, command->word, command->length);
}

/* An entry as it was read: [position, [name, value, …]]. Looks at every field, and returns the event's number. */
static size_t look_at(const redisReply *entry) {
    const redisReply *fields = entry->element[1];
    if (fields->elements != 2 * FIELDS) fail("an entry of %zu words", fields->elements);
    for (int field = 0; field < FIELDS; field++)
        if (strcmp(fields->element[2 * field]->str, names[field])) fail("no field %s at its place", names[field]);
    const redisReply *id = fields->element[1], *data = fields->element[2 * FIELDS - 1];
    if (id->len != ID_CHARS || data->len != size) fail("an id or data of another length than was written");
    size_t number = strtoul(data->str + NUMBER_AT, NULL, 10);
    if (number >= events || times_seen[number]++) fail("event %zu came twice, or is none of ours", number);
    return number;
}

/* --- publishing and consuming ------------------------------------------------------------------------------------ */

static void *publish(void *unused) {
    struct command command;
    make_command(&command);
    redisContext *link = connect_to_server();
    for (size_t written = 0, answered = 0; answered < events;) {
        if (written < events && written - answered <= ahead * batch) {
            for (size_t end = written + batch < events ? written + batch : events; written < end; written++)
                append_xadd(link, &command, written);
            flush(link);
            continue;
        }
        for (size_t end = answered + batch < events ? answered + batch : events; answered < end; answered++)
            freeReplyObject(next_reply(link));
    }
    redisFree(link);
    free(command.data);
    return unused;
}

struct reader {
    redisContext *link;
    const char *words[9 + 2 * MAX_STREAMS];  /* the XREADGROUP */
    int word_count;
    size_t per_stream, under_way, seen, acked;
};

static void make_reader(struct reader *reader) {
    static char count[16], block[16];
    *reader = (struct reader){.link = connect_to_server(), .per_stream = (batch + streams - 1) / streams};
    sprintf(count, "%zu", reader->per_stream);
    sprintf(block, "%d", BLOCK_MS);
    const char *head[] = {"XREADGROUP", "GROUP", "g", "c", "COUNT", count, "BLOCK", block, "STREAMS"};
    memcpy(reader->words, head, sizeof head);
    reader->word_count = sizeof head / sizeof *head;
    for (size_t stream = 0; stream < streams; stream++) reader->words[reader->word_count++] = keys[stream];
    for (size_t stream = 0; stream < streams; stream++) reader->words[reader->word_count++] = ">";
}

/* One stream's part of what was read, [key, [entry, …]]: looks at all, and appends their XACK. */
static void take(struct reader *reader, const redisReply *part, double came) {
    static const char *words[3 + MAX_BATCH] = {"XACK", NULL, "g"};
    static size_t lengths[3 + MAX_BATCH] = {4, 0, 1};
    const redisReply *entries = part->element[1];
    words[1] = part->element[0]->str;
    lengths[1] = (size_t)part->element[0]->len;
    for (size_t i = 0; i < entries->elements; i++) {
        size_t number = look_at(entries->element[i]);
        if (took != NULL) took[number] = came - called_at[number];
        words[3 + i] = entries->element[i]->element[0]->str;
        lengths[3 + i] = (size_t)entries->element[i]->element[0]->len;
    }
    reader->seen += entries->elements;
    redisAppendCommandArgv(reader->link, 3 + (int)entries->elements, words, lengths);
}

/* A read is sent only where something is left for it, so that none waits in vain at the end. */
static void consume(void) {
    struct reader reader;
    make_reader(&reader);
    while (reader.acked < events) {
        while (reader.under_way <= ahead && reader.seen + reader.under_way * reader.per_stream * streams < events) {
            redisAppendCommandArgv(reader.link, reader.word_count, reader.words, NULL);
            reader.under_way++;
        }
        flush(reader.link);
        redisReply *reply = next_reply(reader.link);
        if (reply->type == REDIS_REPLY_INTEGER) reader.acked += (size_t)reply->integer;
        else if (reply->type == REDIS_REPLY_NIL) fail("nothing came within %d ms of event %zu", BLOCK_MS, reader.seen);
        else {
            double came = now();
            reader.under_way--;
            for (size_t part = 0; part < reply->elements; part++) take(&reader, reply->element[part], came);
        }
        freeReplyObject(reply);
    }
    redisFree(reader.link);
}

static void *publish_at_rate(void *unused) {
    struct command command;
    make_command(&command);
    redisContext *link = connect_to_server();
    double began = now();
    for (size_t number = 0; number < events; number++) {
        double wait = began + (double)number / (double)rate - now();
        struct timespec pause = {.tv_sec = (time_t)wait, .tv_nsec = (long)((wait - (double)(time_t)wait) * 1e9)};
        if (wait > 0) nanosleep(&pause, NULL);
        called_at[number] = now();
        append_xadd(link, &command, number);
        freeReplyObject(next_reply(link));
    }
    redisFree(link);
    free(command.data);
    return unused;
}

static void consume_beside(void *(*publisher)(void *)) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, publisher, NULL)) fail("no thread");
    consume();
    pthread_join(thread, NULL);
}

/* --- a run ------------------------------------------------------------------------------------------------------- */

static void run(void) {
    if (!strcmp(mode, "publish")) publish(NULL);
    else if (!strcmp(mode, "consume")) consume();
    else if (!strcmp(mode, "both")) consume_beside(publish);
    else consume_beside(publish_at_rate);
}

static void set_up(redisContext *link) {
    times_seen = calloc(events, 1);
    if (!strcmp(mode, "latency")) {
        called_at = calloc(events, sizeof *called_at);
        took = calloc(events, sizeof *took);
    }
    for (size_t stream = 0; stream < streams; stream++) {
        snprintf(keys[stream], KEY_CHARS, "%s:%zu", prefix, stream);
        ask(link, "DEL %s", keys[stream]);
        ask(link, "XGROUP CREATE %s g 0 MKSTREAM", keys[stream]);
    }
    if (!strcmp(mode, "consume")) publish(NULL);
}

static void check_and_clean(redisContext *link) {
    size_t stored = 0, pending = 0;
    for (size_t stream = 0; stream < streams; stream++) {
        stored += (size_t)ask(link, "XLEN %s", keys[stream]);
        pending += (size_t)ask(link, "XPENDING %s g", keys[stream]);
        ask(link, "DEL %s", keys[stream]);
    }
    if (stored != events || pending) fail("%zu stored, %zu pending of %zu events", stored, pending, events);
}

static int by_size(const void *left, const void *right) {
    double difference = *(const double *)left - *(const double *)right;
    return (difference > 0) - (difference < 0);
}

static void print_result(double seconds, double client_s, double server_s) {
    printf("{\"mode\": \"%s\", \"events\": %zu, \"size\": %zu, ", mode, events, size);
    printf("\"streams\": %zu, \"batch\": %zu, \"ahead\": %zu, ", streams, batch, ahead);
    printf("\"seconds\": %.6f, \"rate\": %.0f, ", seconds, (double)events / seconds);
    printf("\"client_us\": %.3f, ", client_s / (double)events * 1e6);
    printf("\"server_us\": %.3f", server_s / (double)events * 1e6);
    if (took != NULL) {
        qsort(took, events, sizeof *took, by_size);
        printf(", \"p50_ms\": %.4f, \"p99_ms\": %.4f", took[events / 2] * 1e3, took[events * 99 / 100] * 1e3);
    }
    puts("}");
}

static size_t number_of(const char *text, size_t least, size_t most) {
    char *end;
    size_t number = strtoul(text, &end, 10);
    if (*end || number < least || number > most) fail("%s: from %zu to %zu", text, least, most);
    return number;
}

static void read_options(int count, char **words) {
    const char *modes = " publish consume both latency ";
    char wanted[16];
    if (count < 2 || snprintf(wanted, sizeof wanted, " %s ", words[1]) >= (int)sizeof wanted || !strstr(modes, wanted))
        fail("the first argument is publish, consume, both or latency; the options are in the head of engine.c");
    mode = words[1];
    for (int letter; (letter = getopt(count - 1, words + 1, "h:p:n:s:k:b:a:r:x:")) != -1;) switch (letter) {
        case 'h': host = optarg; break;
        case 'p': port = (int)number_of(optarg, 1, 65535); break;
        case 'n': events = number_of(optarg, 1, 100000000); break;
        case 's': size = number_of(optarg, MIN_BYTES, MAX_BYTES); break;
        case 'k': streams = number_of(optarg, 1, MAX_STREAMS); break;
        case 'b': batch = number_of(optarg, 1, MAX_BATCH); break;
        case 'a': ahead = number_of(optarg, 0, MAX_AHEAD); break;
        case 'r': rate = number_of(optarg, 1, 1000000); break;
        case 'x': prefix = optarg; break;
        default: exit(1);
    }
    if (strlen(prefix) > KEY_CHARS - 8) fail("a prefix has at most %d characters", KEY_CHARS - 8);
}

int main(int count, char **words) {
    read_options(count, words);
    redisContext *link = connect_to_server();
    set_up(link);
    double server_s = server_cpu_s(link), client_s = client_cpu_s(), began = now();
    run();
    double seconds = now() - began;
    client_s = client_cpu_s() - client_s;
    server_s = server_cpu_s(link) - server_s;
    check_and_clean(link);
    redisFree(link);
    print_result(seconds, client_s, server_s);
}
