// Preloaded into a process, writes down every operation that changes files below one directory, whoever in the
// process asks for it: Python, the extension, a library. One operation at a time, in the order they had effect.
//
//   crash_record_start(root)   begin anew; operations on paths below `root` are kept from here on
//   crash_record_note(text)    put a remark between them
//   crash_record_stop(&size)   end; the records, valid until the next start
//
// A record: uint32 name, path, other, data lengths, int64 fd, int64 offset, uint64 thread, then the four strings.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <set>
#include <string>

namespace {

struct Log {
    std::mutex mutex;
    std::string root, records;
    std::set<int> files;
    bool on = false;
};

Log& log_of() {
    static Log* log = new Log;  // never destroyed: threads may outlive main
    return *log;
}

template <typename F>
F real(F, const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool below(const Log& log, const char* path) {
    const size_t size = log.root.size();
    return log.on && path && strncmp(path, log.root.c_str(), size) == 0 && (!path[size] || path[size] == '/');
}

void put(Log& log, const char* name, const char* path, const char* other, const void* data, size_t nbytes, int fd,
         int64_t offset) {
    const std::string parts[4] = {name, path ? path : "", other ? other : "",
                                  std::string(static_cast<const char*>(data ? data : ""), data ? nbytes : 0)};
    for (const std::string& part : parts) {
        uint32_t size = static_cast<uint32_t>(part.size());
        log.records.append(reinterpret_cast<char*>(&size), 4);
    }
    int64_t numbers[3] = {fd, offset, static_cast<int64_t>(syscall(SYS_gettid))};
    log.records.append(reinterpret_cast<char*>(numbers), sizeof numbers);
    for (const std::string& part : parts) log.records += part;
}

int opened(int dir, const char* path, int flags, mode_t mode) {
    static auto next = real(&openat64, "openat64");
    Log& log = log_of();
    std::unique_lock lock(log.mutex, std::defer_lock);
    const bool ours = (lock.lock(), below(log, path));
    if (!ours) lock.unlock();  // may block for long: a pipe, a slow device
    struct stat found;
    const bool made = ours && (flags & O_CREAT) && fstatat(dir, path, &found, AT_SYMLINK_NOFOLLOW) != 0;
    int fd = next(dir, path, flags, mode);
    if (ours && fd >= 0) {
        log.files.insert(fd);
        put(log, made ? "create" : "open", path, nullptr, nullptr, 0, fd, (flags & O_TRUNC) != 0);
    }
    return fd;
}

template <typename Call>
auto on_file(const char* name, int fd, const void* data, int64_t offset, Call call) {
    Log& log = log_of();
    std::unique_lock lock(log.mutex);
    const bool ours = log.on && log.files.count(fd);
    if (!ours) lock.unlock();
    auto answer = call();
    if (ours && answer >= 0) {
        const size_t nbytes = data ? static_cast<size_t>(answer) : 0;
        if (data && offset < 0) offset = lseek(fd, 0, SEEK_CUR) - static_cast<int64_t>(nbytes);
        put(log, name, nullptr, nullptr, data, nbytes, fd, offset);
    }
    return answer;
}

template <typename Call>
int on_path(const char* name, const char* path, const char* other, int64_t flags, Call call) {
    Log& log = log_of();
    std::unique_lock lock(log.mutex);
    const bool ours = below(log, path) || below(log, other);
    if (!ours) lock.unlock();
    int answer = call();
    if (ours && answer == 0) put(log, name, path, other, nullptr, 0, -1, flags);
    return answer;
}

mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? static_cast<mode_t>(va_arg(rest, int)) : 0; }

}  // namespace

extern "C" {

void crash_record_start(const char* root) {
    Log& log = log_of();
    std::lock_guard lock(log.mutex);
    log.root = root;
    log.records.clear();
    log.files.clear();
    log.on = true;
}

void crash_record_note(const char* text) {
    Log& log = log_of();
    std::lock_guard lock(log.mutex);
    if (log.on) put(log, "note", text, nullptr, nullptr, 0, -1, 0);
}

const char* crash_record_stop(size_t* nbytes) {
    Log& log = log_of();
    std::lock_guard lock(log.mutex);
    log.on = false;
    *nbytes = log.records.size();
    return log.records.data();
}

#define OPEN(NAME, DIR, ...)                               \
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

int close(int fd) {
    static auto next = real(&close, "close");
    Log& log = log_of();
    {
        std::lock_guard lock(log.mutex);
        log.files.erase(fd);
    }
    return next(fd);
}

ssize_t write(int fd, const void* data, size_t nbytes) {
    static auto next = real(&write, "write");
    return on_file("write", fd, data, -1, [&] { return next(fd, data, nbytes); });
}
ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
    static auto next = real(&pwrite, "pwrite");
    return on_file("write", fd, data, offset, [&] { return next(fd, data, nbytes, offset); });
}
ssize_t pwrite64(int fd, const void* data, size_t nbytes, off64_t offset) {
    static auto next = real(&pwrite64, "pwrite64");
    return on_file("write", fd, data, offset, [&] { return next(fd, data, nbytes, offset); });
}
int ftruncate(int fd, off_t nbytes) {
    static auto next = real(&ftruncate, "ftruncate");
    return on_file("truncate", fd, nullptr, nbytes, [&] { return next(fd, nbytes); });
}
int ftruncate64(int fd, off64_t nbytes) {
    static auto next = real(&ftruncate64, "ftruncate64");
    return on_file("truncate", fd, nullptr, nbytes, [&] { return next(fd, nbytes); });
}
int fallocate(int fd, int mode, off_t offset, off_t nbytes) {
    static auto next = real(&fallocate, "fallocate");
    return on_file("allocate", fd, nullptr, offset + nbytes, [&] { return next(fd, mode, offset, nbytes); });
}
int fallocate64(int fd, int mode, off64_t offset, off64_t nbytes) {
    static auto next = real(&fallocate64, "fallocate64");
    return on_file("allocate", fd, nullptr, offset + nbytes, [&] { return next(fd, mode, offset, nbytes); });
}
int fsync(int fd) {
    static auto next = real(&fsync, "fsync");
    return on_file("fsync", fd, nullptr, 0, [&] { return next(fd); });
}
int fdatasync(int fd) {
    static auto next = real(&fdatasync, "fdatasync");
    return on_file("fsync", fd, nullptr, 0, [&] { return next(fd); });
}

int rename(const char* from, const char* to) {
    static auto next = real(&rename, "rename");
    return on_path("rename", from, to, 0, [&] { return next(from, to); });
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    static auto next = real(&renameat2, "renameat2");
    return on_path(flags == 2 ? "exchange" : "rename", from, to, flags, [&] { return next(a, from, b, to, flags); });
}
int link(const char* from, const char* to) {
    static auto next = real(&link, "link");
    return on_path("link", from, to, 0, [&] { return next(from, to); });
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
    static auto next = real(&linkat, "linkat");
    return on_path("link", from, to, 0, [&] { return next(a, from, b, to, flags); });
}
int unlink(const char* path) {
    static auto next = real(&unlink, "unlink");
    return on_path("unlink", path, nullptr, 0, [&] { return next(path); });
}
int rmdir(const char* path) {
    static auto next = real(&rmdir, "rmdir");
    return on_path("rmdir", path, nullptr, 0, [&] { return next(path); });
}
int mkdir(const char* path, mode_t mode) {
    static auto next = real(&mkdir, "mkdir");
    return on_path("mkdir", path, nullptr, 0, [&] { return next(path, mode); });
}

}  // extern "C"
