// Preloaded into a process, lets files below one directory behave as on NFS, as seen by a client of its own.
//
//   nfs_start(root, milliseconds, one_in, seed)
//
// - A name that was looked up and not found stays not found for that long, though another process makes it,
// unless its
//   directory is listed, or this process makes it or hears that it exists.
// - One in so many renames, links, mkdirs, unlinks and rmdirs is sent twice, because the first answer is
// lost: it has
//   its effect, and then the answer of doing it again.
// - There is no exchange of two names.
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <mutex>
#include <random>
#include <string>

namespace {

using Clock = std::chrono::steady_clock;

struct Client {
    std::mutex mutex;
    std::string root;
    std::chrono::milliseconds keeps{0};
    unsigned one_in = 0;
    std::mt19937 noise;
    std::map<std::string, Clock::time_point> missing;
};

Client& client() {
    static Client* made = new Client;  // never destroyed: threads may outlive main
    return *made;
}

template <typename F>
F real(F, const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool below(const Client& c, const char* path) {
    const size_t size = c.root.size();
    return size && path && strncmp(path, c.root.c_str(), size) == 0 && path[size] == '/';
}

// Whether the client still believes that `path`, or a directory on the way to it, is not there.
bool believed_missing(const char* path) {
    Client& c = client();
    std::lock_guard lock(c.mutex);
    if (!below(c, path)) return false;
    for (std::string name = path; name.size() > c.root.size(); name.resize(name.rfind('/'))) {
        auto found = c.missing.find(name);
        if (found == c.missing.end()) continue;
        if (Clock::now() < found->second) return true;
        c.missing.erase(found);
    }
    return false;
}

// Remembers the first name on the way to `path` that is not there; what may be below it was never asked for.
void not_found(const char* path) {
    static auto next = real(&lstat, "lstat");
    Client& c = client();
    std::lock_guard lock(c.mutex);
    if (!below(c, path)) return;
    std::string name = path;
    for (struct stat found;;) {
        const std::string folder = name.substr(0, name.rfind('/'));
        if (folder.size() <= c.root.size() || next(folder.c_str(), &found) == 0) break;
        name = folder;
    }
    c.missing[name] = Clock::now() + c.keeps;
}

// The answer of the server says that `folder` has changed: what was believed missing there is asked for anew.
void listed(const std::string& path) {
    Client& c = client();
    std::lock_guard lock(c.mutex);
    const std::string folder = path + "/";
    for (auto at = c.missing.lower_bound(folder); at != c.missing.end() && at->first.rfind(folder, 0) == 0;)
        at = at->first.find('/', folder.size()) == std::string::npos ? c.missing.erase(at) : std::next(at);
}

bool sent_twice(const char* path) {
    Client& c = client();
    std::lock_guard lock(c.mutex);
    return below(c, path) && c.one_in && c.noise() % c.one_in == 0;
}

void changed_beside(const char* path) {
    const std::string name = path;
    if (name.rfind('/') != std::string::npos) listed(name.substr(0, name.rfind('/')));
}

template <typename Call>
int look_up(const char* path, Call call) {
    if (believed_missing(path)) {
        errno = ENOENT;
        return -1;
    }
    int answer = call();
    if (answer < 0 && errno == ENOENT) {
        not_found(path);
        errno = ENOENT;
    }
    return answer;
}

template <typename Call>
int change(const char* path, const char* other, Call call) {
    int answer = call();
    if (answer == 0 && sent_twice(path)) answer = call();
    const int code = errno;
    changed_beside(path);
    if (other) changed_beside(other);
    errno = code;
    return answer;
}

int opened(int dir, const char* path, int flags, mode_t mode) {
    static auto next = real(&openat64, "openat64");
    if (!(flags & O_CREAT)) return look_up(path, [&] { return next(dir, path, flags, mode); });
    int answer = next(dir, path, flags, mode);
    const int code = errno;
    changed_beside(path);
    errno = code;
    return answer;
}

}  // namespace

extern "C" {

void nfs_start(const char* root, int milliseconds, unsigned one_in, unsigned seed) {
    Client& c = client();
    std::lock_guard lock(c.mutex);
    c.root = root;
    c.keeps = std::chrono::milliseconds(milliseconds);
    c.one_in = one_in;
    c.noise.seed(seed);
}

#define OPEN(NAME, DIR, ...)                   \
    int NAME(__VA_ARGS__, int flags, ...) {    \
        mode_t mode = 0;                       \
        if (flags & (O_CREAT | O_TMPFILE)) {   \
            va_list rest;                      \
            va_start(rest, flags);             \
            mode = va_arg(rest, mode_t);       \
            va_end(rest);                      \
        }                                      \
        return opened(DIR, path, flags, mode); \
    }
OPEN(open, AT_FDCWD, const char* path)
OPEN(open64, AT_FDCWD, const char* path)
OPEN(openat, dir, int dir, const char* path)
OPEN(openat64, dir, int dir, const char* path)

#define STAT(NAME, TYPE)                                         \
    int NAME(const char* path, struct TYPE* found) {             \
        static auto next = real(&NAME, #NAME);                   \
        return look_up(path, [&] { return next(path, found); }); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTATAT(NAME, TYPE)                                                  \
    int NAME(int dir, const char* path, struct TYPE* found, int flags) {     \
        static auto next = real(&NAME, #NAME);                               \
        return look_up(path, [&] { return next(dir, path, found, flags); }); \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

DIR* opendir(const char* path) {
    static auto next = real(&opendir, "opendir");
    DIR* found = next(path);
    if (found) listed(path);
    return found;
}

int rename(const char* from, const char* to) {
    static auto next = real(&rename, "rename");
    return change(from, to, [&] { return next(from, to); });
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    static auto next = real(&renameat2, "renameat2");
    if (flags && below(client(), from)) {
        errno = EINVAL;
        return -1;
    }
    return change(from, to, [&] { return next(a, from, b, to, flags); });
}
int link(const char* from, const char* to) {
    static auto next = real(&link, "link");
    return change(from, to, [&] { return next(from, to); });
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
    static auto next = real(&linkat, "linkat");
    return change(from, to, [&] { return next(a, from, b, to, flags); });
}
int mkdir(const char* path, mode_t mode) {
    static auto next = real(&mkdir, "mkdir");
    return change(path, nullptr, [&] { return next(path, mode); });
}
int unlink(const char* path) {
    static auto next = real(&unlink, "unlink");
    return change(path, nullptr, [&] { return next(path); });
}
int rmdir(const char* path) {
    static auto next = real(&rmdir, "rmdir");
    return change(path, nullptr, [&] { return next(path); });
}

}  // extern "C"
