/* power.c: what a server has written and not synced is gone when it is killed, as if the machine had lost its power.
 *
 * Why   After SIGKILL the kernel still writes what was given to it, so a server that never calls fsync would lose nothing.
 * How   Loaded before the C library (LD_PRELOAD). What is written to a file whose name ends in ".incr.aof" stays in our
 *       memory until fsync or fdatasync; nothing else is touched. Such a file is not read while it is written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILES 1024

static struct { int ours; char *data; size_t length, room; } files[FILES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int is_ours(int fd) { return fd >= 0 && fd < FILES && files[fd].ours; }

static int opened(int fd, const char *path, int flags) {
    size_t length = strlen(path), end = strlen(".incr.aof");
    if (fd >= 0 && fd < FILES && (flags & O_ACCMODE) != O_RDONLY)
        files[fd].ours = length > end && !strcmp(path + length - end, ".incr.aof");
    return fd;
}

#define OPEN(NAME) \
    int NAME(const char *path, int flags, ...) { \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #NAME); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return opened(real(path, flags, mode), path, flags); \
    }

OPEN(open)
OPEN(open64)

static int flushed(int fd) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    size_t done = 0;
    while (done < files[fd].length) {
        ssize_t count = real(fd, files[fd].data + done, files[fd].length - done);
        if (count < 0) return -1;
        done += count;
    }
    files[fd].length = 0;
    return 0;
}

ssize_t write(int fd, const void *data, size_t count) {
    if (!is_ours(fd)) return ((ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write"))(fd, data, count);
    pthread_mutex_lock(&lock);
    if (files[fd].length + count > files[fd].room) {
        files[fd].room = 2 * (files[fd].length + count);
        files[fd].data = realloc(files[fd].data, files[fd].room);
        if (!files[fd].data) abort();
    }
    memcpy(files[fd].data + files[fd].length, data, count);
    files[fd].length += count;
    pthread_mutex_unlock(&lock);
    return count;
}

static int synced(int fd, const char *name) {
    int failed = 0;
    if (is_ours(fd)) {
        pthread_mutex_lock(&lock);
        failed = flushed(fd);
        pthread_mutex_unlock(&lock);
    }
    return failed ? failed : ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

int close(int fd) {
    if (is_ours(fd)) {
        pthread_mutex_lock(&lock);
        flushed(fd);
        files[fd].ours = 0;
        pthread_mutex_unlock(&lock);
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "close"))(fd);
}
