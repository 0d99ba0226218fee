// Preloaded into a process, lets files below one directory lie on a file system without hard links.
//
//   NO_LINKS_BELOW    the directory
//   NO_LINKS_ERRNO    what link(2) answers there; EPERM if unset
//   NO_LINKS_FLAGS    if set, renameat2 takes no flags there either: EINVAL, as gcsfuse says
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <string>

namespace {

template <typename F>
F real(F, const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool below(const char* path) {
    static const char* root = getenv("NO_LINKS_BELOW");
    if (!root || !path) return false;
    std::string whole = path;
    if (path[0] != '/') {
        char folder[4096];
        if (!getcwd(folder, sizeof folder)) return false;
        whole = std::string(folder) + "/" + path;
    }
    return whole.rfind(std::string(root) + "/", 0) == 0;
}

int refused() {
    const char* code = getenv("NO_LINKS_ERRNO");
    errno = code ? atoi(code) : EPERM;
    return -1;
}

}  // namespace

extern "C" {

int link(const char* from, const char* to) {
    static auto next = real(&link, "link");
    return below(from) || below(to) ? refused() : next(from, to);
}
int linkat(int a, const char* from, int b, const char* to, int flags) {
    static auto next = real(&linkat, "linkat");
    return below(from) || below(to) ? refused() : next(a, from, b, to, flags);
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    static auto next = real(&renameat2, "renameat2");
    if (flags && getenv("NO_LINKS_FLAGS") && (below(from) || below(to))) {
        errno = EINVAL;
        return -1;
    }
    return next(a, from, b, to, flags);
}

}  // extern "C"
