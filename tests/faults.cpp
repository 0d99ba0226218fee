// Preloaded into a process, lets calls that change the disk fail, or write less than asked, whoever in the
// process makes them: Python, the extension, a library. It also tells another wall clock.
//
//   faults_rule(operations, path, skip, times, code)
//       of calls of these operations (their names in one string, or "*") on files whose path holds `path`,
//       `skip` go through, then `times` (-1: all) fail with errno `code`; with code 0 a write writes about
//       half of what it was given; with code -1 the call waits for faults_clear, with another negative one it
//       fails with -code then
//   faults_clear()             forget all rules
//   faults_struck()            how often a call was made to fail
//   faults_log(path), faults_text(&size)
//       note each call on paths that hold `path`; the lines "operation errno inode path"
//   faults_clock(seconds)      let the wall clock jump to and fro by multiples of so much, at every look
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int kPass = -2;  // no rule
constexpr size_t kPage = 4096;

struct Rule {
    std::string operations, path;
    int skip, times, code;
};

struct Faults {
    std::mutex mutex;
    std::vector<Rule> rules;
    std::string log, logged;
    int struck = 0, clears = 0;
    std::atomic<bool> on{false};
    std::atomic<long> clock{0};
    std::atomic<unsigned> looks{0};
};

Faults& faults() {
    static Faults* made = new Faults;  // never destroyed: threads may outlive main
    return *made;
}

template <typename F>
F real(F, const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

std::string path_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path);
    return std::string(path, size < 0 ? 0 : static_cast<size_t>(size));
}

// What is to become of a call: kPass, or the code of a rule.
int verdict(const char* operation, const std::string& path) {
    Faults& all = faults();
    std::unique_lock lock(all.mutex);
    for (Rule& rule : all.rules) {
        const std::string name = std::string(" ") + operation + " ";
        if (rule.operations == "*" && !strcmp(operation, "direct")) continue;
        if (rule.operations != "*" && (" " + rule.operations + " ").find(name) == std::string::npos) continue;
        if (path.find(rule.path) == std::string::npos) continue;
        if (rule.code == 0 && strcmp(operation, "write") != 0) continue;
        if (rule.skip > 0) {
            --rule.skip;
            continue;
        }
        if (rule.times == 0) continue;
        if (rule.times > 0) --rule.times;
        ++all.struck;
        const int code = rule.code;
        if (code >= 0) return code;
        for (const int began = all.clears; began == all.clears;) {
            lock.unlock();
            usleep(1000);
            lock.lock();
        }
        return code == -1 ? kPass : -code;
    }
    return kPass;
}

void note(const char* operation, const std::string& path, int code, unsigned long inode) {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    if (all.log.empty() || path.find(all.log) == std::string::npos) return;
    all.logged +=
        std::string(operation) + " " + std::to_string(code) + " " + std::to_string(inode) + " " + path + "\n";
}

template <typename Call>
auto on_file(const char* operation, int fd, Call call) -> decltype(call(false)) {
    if (!faults().on) return call(false);
    const int kept = errno;
    const std::string path = path_of(fd);
    const int code = verdict(operation, path);
    struct stat found;
    const unsigned long inode = fstat(fd, &found) == 0 ? found.st_ino : 0;
    errno = kept;
    auto answer = code > 0 ? -1 : call(code == 0);
    if (code > 0) errno = code;
    const int after = errno;
    note(operation, path, answer < 0 ? after : 0, inode);
    errno = after;
    return answer;
}

template <typename Call>
int on_path(const char* operation, const char* path, const char* other, Call call) {
    if (!faults().on) return call();
    const std::string told = std::string(path ? path : "") + (other ? std::string(" ") + other : "");
    const int code = verdict(operation, told);
    int answer = code > 0 ? -1 : call();
    if (code > 0) errno = code;
    const int after = errno;
    note(operation, told, answer < 0 ? after : 0, 0);
    errno = after;
    return answer;
}

int opened(int dir, const char* path, int flags, mode_t mode) {
    static auto next = real(&openat64, "openat64");
    if ((flags & O_DIRECT) && faults().on && verdict("direct", path) != kPass) {
        errno = EINVAL;
        return -1;
    }
    auto call = [&] { return next(dir, path, flags, mode); };
    const bool changes = flags & (O_CREAT | O_TRUNC);
    return changes ? on_path("create", path, nullptr, call) : call();
}

// About half; of direct I/O whole pages, as a disk does.
size_t less(int fd, size_t nbytes) {
    const size_t half = nbytes / 2;
    if (fcntl(fd, F_GETFL) & O_DIRECT) return half >= kPage ? half / kPage * kPage : nbytes;
    return half > 0 ? half : nbytes;
}

mode_t mode_of(int flags, va_list rest) {
    return flags & O_CREAT ? static_cast<mode_t>(va_arg(rest, int)) : 0;
}

long jump() {
    Faults& all = faults();
    const long far = all.clock;
    return far * (static_cast<long>(all.looks++ * 7919u % 101u) - 50);
}

}  // namespace

extern "C" {

void faults_rule(const char* operations, const char* path, int skip, int times, int code) {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    all.rules.push_back({operations, path, skip, times, code});
    all.on = true;
}

void faults_clear() {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    all.rules.clear();
    all.struck = 0;
    ++all.clears;
}

int faults_struck() {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    return all.struck;
}

void faults_log(const char* path) {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    all.log = path;
    all.logged.clear();
    all.on = true;
}

const char* faults_text(size_t* nbytes) {
    Faults& all = faults();
    std::lock_guard lock(all.mutex);
    *nbytes = all.logged.size();
    return all.logged.data();
}

void faults_clock(long seconds) { faults().clock = seconds; }

#define OPEN(NAME, DIR, ...)                                 \
    int NAME(__VA_ARGS__ const char* path, int flags, ...) { \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = mode_of(flags, rest);                  \
        va_end(rest);                                        \
        return opened(DIR, path, flags, mode);               \
    }
OPEN(open, AT_FDCWD, )
OPEN(open64, AT_FDCWD, )
OPEN(openat, dir, int dir, )
OPEN(openat64, dir, int dir, )

ssize_t write(int fd, const void* data, size_t nbytes) {
    static auto next = real(&write, "write");
    return on_file("write", fd, [&](bool cut) { return next(fd, data, cut ? less(fd, nbytes) : nbytes); });
}
ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
    static auto next = real(&pwrite, "pwrite");
    return on_file("write", fd,
                   [&](bool cut) { return next(fd, data, cut ? less(fd, nbytes) : nbytes, offset); });
}
ssize_t pwrite64(int fd, const void* data, size_t nbytes, off64_t offset) {
    static auto next = real(&pwrite64, "pwrite64");
    return on_file("write", fd,
                   [&](bool cut) { return next(fd, data, cut ? less(fd, nbytes) : nbytes, offset); });
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
    static auto next = real(&writev, "writev");
    return on_file("write", fd,
                   [&](bool cut) { return next(fd, parts, cut && count > 1 ? count / 2 : count); });
}
int ftruncate(int fd, off_t nbytes) {
    static auto next = real(&ftruncate, "ftruncate");
    return on_file("truncate", fd, [&](bool) { return next(fd, nbytes); });
}
int ftruncate64(int fd, off64_t nbytes) {
    static auto next = real(&ftruncate64, "ftruncate64");
    return on_file("truncate", fd, [&](bool) { return next(fd, nbytes); });
}
int fallocate(int fd, int mode, off_t offset, off_t nbytes) {
    static auto next = real(&fallocate, "fallocate");
    return on_file("allocate", fd, [&](bool) { return next(fd, mode, offset, nbytes); });
}
int fallocate64(int fd, int mode, off64_t offset, off64_t nbytes) {
    static auto next = real(&fallocate64, "fallocate64");
    return on_file("allocate", fd, [&](bool) { return next(fd, mode, offset, nbytes); });
}
int fsync(int fd) {
    static auto next = real(&fsync, "fsync");
    struct stat found;
    const bool is_dir = faults().on && fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
    return on_file(is_dir ? "fsync_dir" : "fsync", fd, [&](bool) { return next(fd); });
}
int fdatasync(int fd) {
    static auto next = real(&fdatasync, "fdatasync");
    return on_file("fsync", fd, [&](bool) { return next(fd); });
}

int rename(const char* from, const char* to) {
    static auto next = real(&rename, "rename");
    return on_path("rename", from, to, [&] { return next(from, to); });
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    static auto next = real(&renameat2, "renameat2");
    return on_path("rename", from, to, [&] { return next(a, from, b, to, flags); });
}
int link(const char* from, const char* to) {
    static auto next = real(&link, "link");
    return on_path("link", from, to, [&] { return next(from, to); });
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
    static auto next = real(&linkat, "linkat");
    return on_path("link", from, to, [&] { return next(a, from, b, to, flags); });
}
int unlink(const char* path) {
    static auto next = real(&unlink, "unlink");
    return on_path("unlink", path, nullptr, [&] { return next(path); });
}
int rmdir(const char* path) {
    static auto next = real(&rmdir, "rmdir");
    return on_path("rmdir", path, nullptr, [&] { return next(path); });
}
int mkdir(const char* path, mode_t mode) {
    static auto next = real(&mkdir, "mkdir");
    return on_path("mkdir", path, nullptr, [&] { return next(path, mode); });
}

int clock_gettime(clockid_t which, struct timespec* now) {
    static auto next = real(&clock_gettime, "clock_gettime");
    int answer = next(which, now);
    if (answer == 0 && which == CLOCK_REALTIME) now->tv_sec += jump();
    return answer;
}
time_t time(time_t* now) {
    struct timespec told;
    clock_gettime(CLOCK_REALTIME, &told);
    if (now) *now = told.tv_sec;
    return told.tv_sec;
}
int gettimeofday(struct timeval* now, void*) {
    struct timespec told;
    clock_gettime(CLOCK_REALTIME, &told);
    now->tv_sec = told.tv_sec;
    now->tv_usec = told.tv_nsec / 1000;
    return 0;
}
// Times that are to be "now" are those of the clock that jumps.
int utimensat(int dir, const char* path, const struct timespec times[2], int flags) {
    static auto next = real(&utimensat, "utimensat");
    struct timespec told[2];
    if (!times && faults().clock) {
        clock_gettime(CLOCK_REALTIME, &told[0]);
        told[1] = told[0];
        times = told;
    }
    return on_path("times", path, nullptr, [&] { return next(dir, path, times, flags); });
}

}  // extern "C"
