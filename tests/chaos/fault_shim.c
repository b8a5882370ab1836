/* Preloaded into a process under test. Counts its durable steps (writes, syncs, renames and unlinks below
 * FAULT_ROOT) and kills it before, fails, or tears the N-th; shifts its wall clock by the seconds in
 * FAULT_CLOCK (a mapped file); kills it once it has sent FAULT_SEND bytes. The program does not know. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, NAME = 4 };                /* Kinds of steps; `kinds` is a sum of them. */
enum { KILL = 0, FAIL = 1, FAIL_ON = 2, TEAR = 3 };    /* FAIL_ON: this step and all later ones fail. */
static atomic_long steps, sent;
static long kinds, target, action, error, limit = -1;
static int record = -1;
static const char *root;
static volatile long *shift;

static void die(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); for (;;) pause(); }

__attribute__((constructor)) static void begin(void) {
    const char *clock = getenv("FAULT_CLOCK"), *log = getenv("FAULT_LOG"), *bytes = getenv("FAULT_SEND");
    root = getenv("FAULT_ROOT");
    if (log) record = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (bytes) limit = atol(bytes);
    int fd = clock ? open(clock, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) shift = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, fd, 0), close(fd);
}

void fault_arm(long of_kinds, long at, long what, long number) {
    kinds = of_kinds, target = at, action = what, error = number, steps = 0;
}
long fault_steps(void) { return steps; }

/* Return 0 when the step may go on, 1 when it is to fail with errno set, 2 when only half is to be written. */
static int step(int kind, const char *name, const char *path) {
    if (!(kinds & kind) || !root || !path || strncmp(path, root, strlen(root))) return 0;
    if (strstr(path, "-shm")) return 0; /* SQLite's index of its log: rebuilt, never relied on. */
    long at = ++steps;
    char line[512];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", at, name, path + strlen(root));
    if (record >= 0) syscall(SYS_write, record, line, length < 512 ? length : 511);
    if (at != target && !(action == FAIL_ON && at > target)) return 0;
    if (action == TEAR && kind == WRITE) return 2;
    if (action == KILL || action == TEAR) die();
    errno = error;
    return 1;
}
static int step_fd(int kind, const char *name, int fd) {
    char link[32], path[512];
    if (!kinds) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return step(kind, name, path);
}

#define WRITES(NAME_, CALL_, HALF_, ...)                                                                  \
    ssize_t NAME_(int fd, const void *data, size_t n, ##__VA_ARGS__) {                                    \
        int verdict = step_fd(WRITE, #NAME_, fd);                                                         \
        if (verdict == 2) HALF_, die();                                                                   \
        return verdict ? -1 : CALL_;                                                                      \
    }
WRITES(write, syscall(SYS_write, fd, data, n), syscall(SYS_write, fd, data, n / 2))
WRITES(pwrite, syscall(SYS_pwrite64, fd, data, n, at), syscall(SYS_pwrite64, fd, data, n / 2, at), off_t at)
WRITES(pwrite64, syscall(SYS_pwrite64, fd, data, n, at), syscall(SYS_pwrite64, fd, data, n / 2, at), off_t at)
int fsync(int fd) { return step_fd(SYNC, "fsync", fd) ? -1 : syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return step_fd(SYNC, "fdatasync", fd) ? -1 : syscall(SYS_fdatasync, fd); }
int ftruncate64(int fd, off_t n) { return step_fd(NAME, "ftruncate", fd) ? -1 : syscall(SYS_ftruncate, fd, n); }
int unlink(const char *path) { return step(NAME, "unlink", path) ? -1 : syscall(SYS_unlink, path); }
int rename(const char *a, const char *b) { return step(NAME, "rename", b) ? -1 : syscall(SYS_rename, a, b); }

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    for (size_t i = 0; limit >= 0 && i < message->msg_iovlen; i++) {
        long n = message->msg_iov[i].iov_len, left = limit - atomic_fetch_add(&sent, n);
        if (left > n) continue;
        struct msghdr cut = *message; /* The bytes up to the limit still go out. */
        cut.msg_iovlen = i + 1, message->msg_iov[i].iov_len = left > 0 ? left : 0;
        syscall(SYS_sendmsg, fd, &cut, flags), die();
    }
    return syscall(SYS_sendmsg, fd, message, flags);
}

int clock_gettime(clockid_t id, struct timespec *t) {
    int result = syscall(SYS_clock_gettime, id, t);
    if (shift && !result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += *shift;
    return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    int result = syscall(SYS_gettimeofday, t, zone);
    if (shift && !result) t->tv_sec += *shift;
    return result;
}
time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return out ? *out = t.tv_sec : t.tv_sec;
}
