#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace roll {
namespace {

std::string text_of(int code) { return std::generic_category().message(code); }

std::string span(uint64_t nbytes, uint64_t offset) {
    return std::to_string(nbytes) + " bytes at offset " + std::to_string(offset);
}

}  // namespace

FileError::FileError(int code, const std::string& what, std::string path)
    : std::runtime_error(what), code(code), path(std::move(path)) {}

File File::open_with(const std::string& path, int flags, bool direct) {
    for (;;) {
        int fd = ::open(path.c_str(), flags | O_CLOEXEC | (direct ? O_DIRECT : 0), 0666);
        if (fd >= 0) return File(path, fd, direct);
        int code = errno;
        if (code == EINTR) continue;
        if (direct && (code == EINVAL || code == EOPNOTSUPP)) {
            direct = false;
            continue;
        }
        struct stat info;
        if (code == EWOULDBLOCK && (flags & O_NONBLOCK) && stat(path.c_str(), &info) == 0 &&
            S_ISREG(info.st_mode)) {
            // Another process holds a lease (fcntl F_SETLEASE) on the file; an open that waits makes it give
            // that up.
            flags &= ~O_NONBLOCK;
            continue;
        }
        throw FileError(code, "open failed: " + text_of(code), path);
    }
}

File File::create(const std::string& path, bool direct) {
    return open_with(path, O_WRONLY | O_CREAT | O_TRUNC, direct);
}

File File::open(const std::string& path, bool direct) {
    // Without O_NONBLOCK the open of a named pipe would wait forever.
    return open_with(path, O_RDONLY | O_NONBLOCK, direct);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), direct_(other.direct_.load()) {}

File::~File() {
    if (fd_ >= 0) ::close(fd_);
}

void File::fail(int code, const std::string& operation) const {
    throw FileError(code, operation + " failed: " + text_of(code), path_);
}

// True if the error only means that this file system has no direct I/O; then direct I/O is switched off.
bool File::leave_direct(int code) {
    if (!direct_ || (code != EINVAL && code != EOPNOTSUPP)) return false;
    int flags = fcntl(fd_, F_GETFL);
    if (flags < 0 || fcntl(fd_, F_SETFL, flags & ~O_DIRECT) < 0) return false;
    direct_ = false;
    return true;
}

uint64_t File::size() const {
    struct stat info;
    if (fstat(fd_, &info) != 0) fail(errno, "stat");
    if (!S_ISREG(info.st_mode)) fail(S_ISDIR(info.st_mode) ? EISDIR : EINVAL, "reading as a regular file");
    return static_cast<uint64_t>(info.st_size);
}

void File::allocate(uint64_t nbytes) {
    if (nbytes == 0) return;
    while (fallocate(fd_, 0, 0, static_cast<off_t>(nbytes)) != 0) {
        int code = errno;
        if (code == EINTR) continue;
        if (code == EOPNOTSUPP || code == ENOSYS) return;
        fail(code, "allocating " + std::to_string(nbytes) + " bytes");
    }
}

void File::write_at(const void* data, uint64_t nbytes, uint64_t offset) {
    uint64_t done = 0;
    while (done < nbytes) {
        bool was_direct = direct_;
        ssize_t count = pwrite(fd_, static_cast<const char*>(data) + done, nbytes - done,
                               static_cast<off_t>(offset + done));
        if (count > 0) {
            done += static_cast<uint64_t>(count);
            // A direct write must continue at a page: the bytes between are written once more, unchanged.
            if (was_direct && done < nbytes) {
                uint64_t aligned = done / kPage * kPage;
                if (aligned + static_cast<uint64_t>(count) <= done)
                    fail(EIO, "writing " + span(nbytes, offset));
                done = aligned;
            }
            continue;
        }
        int code = count == 0 ? EIO : errno;
        if (code == EINTR) continue;
        // Another thread may have switched direct I/O off while this write was running.
        if ((was_direct && !direct_ && code == EINVAL) || leave_direct(code)) continue;
        fail(code, "writing " + span(nbytes - done, offset + done));
    }
    // Start writeback now, so that dirty pages do not pile up until fsync.
    if (!direct_)
        sync_file_range(fd_, static_cast<off_t>(offset), static_cast<off_t>(nbytes), SYNC_FILE_RANGE_WRITE);
}

uint64_t File::read_at(void* data, uint64_t nbytes, uint64_t offset) {
    uint64_t done = 0;
    while (done < nbytes) {
        bool was_direct = direct_;
        ssize_t count =
            pread(fd_, static_cast<char*>(data) + done, nbytes - done, static_cast<off_t>(offset + done));
        if (count == 0) break;
        if (count > 0) {
            done += static_cast<uint64_t>(count);
            continue;  // an unaligned rest after a short direct read switches direct I/O off below
        }
        int code = errno;
        if (code == EINTR) continue;
        if (was_direct && code == EINVAL && done % kPage != 0 && offset + done >= size()) break;
        if ((was_direct && !direct_ && code == EINVAL) || leave_direct(code)) continue;
        fail(code, "reading " + span(nbytes - done, offset + done));
    }
    return done;
}

void File::truncate(uint64_t nbytes) {
    while (ftruncate(fd_, static_cast<off_t>(nbytes)) != 0) {
        if (errno != EINTR) fail(errno, "truncating to " + std::to_string(nbytes) + " bytes");
    }
}

void File::sync() {
    while (fsync(fd_) != 0) {
        if (errno != EINTR) fail(errno, "fsync");
    }
}

void File::close() {
    // close() frees the descriptor even if it reports an error (EINTR too): never close it twice.
    int code = ::close(std::exchange(fd_, -1)) == 0 ? 0 : errno;
    if (code != 0 && code != EINTR) fail(code, "close");
}

}  // namespace roll
