// The only part of the extension that touches the disk.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace roll {

constexpr uint64_t kPage = 4096;  // what direct I/O needs of addresses, offsets and lengths

constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// A failed operation on a file: the operation, the path and errno.
struct FileError : std::runtime_error {
    FileError(int code, const std::string& what, std::string path);
    int code;
    std::string path;
};

// One open descriptor, closed by the destructor. Several threads may read and write at once; reads and writes
// loop over short counts and EINTR. Direct I/O is used if requested and supported; a file system that refuses
// it (EINVAL, EOPNOTSUPP) is served through the page cache instead. Nothing else is ever retried.
class File {
  public:
    static File create(const std::string& path, bool direct);  // O_CREAT | O_TRUNC, mode 0644 & umask
    static File open(const std::string& path, bool direct);    // for reading

    File(File&& other) noexcept;
    File& operator=(File&&) = delete;
    ~File();

    uint64_t size() const;
    bool direct() const { return direct_; }

    void allocate(uint64_t nbytes);  // throws if the disk is full; does nothing without fallocate
    void write_at(const void* data, uint64_t nbytes, uint64_t offset);
    // Reads until nbytes are read or the file ends; returns how many were read.
    uint64_t read_at(void* data, uint64_t nbytes, uint64_t offset);
    void truncate(uint64_t nbytes);
    void sync();
    void close();

  private:
    File(std::string path, int fd, bool direct) : path_(std::move(path)), fd_(fd), direct_(direct) {}
    static File open_with(const std::string& path, int flags, bool direct);
    bool leave_direct(int code);
    [[noreturn]] void fail(int code, const std::string& operation) const;

    std::string path_;
    int fd_ = -1;
    std::atomic<bool> direct_{false};
};

}  // namespace roll
