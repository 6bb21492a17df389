/* A file system that lacks calls, for the files under LACKS_UNDER: LACKS names the calls, LACKS_ERRNO their error.
   Used with LD_PRELOAD. The variables are read at each call, so that a process can change them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE return errno = atoi(getenv("LACKS_ERRNO")), -1

static int lacks(const char *what) {
  const char *given = getenv("LACKS"); /* ", fsync, link, " */
  char item[64];
  snprintf(item, sizeof item, ", %s, ", what);
  return given && strstr(given, item);
}
static int under(const char *path) {
  const char *root = getenv("LACKS_UNDER");
  return root && path && !strncmp(path, root, strlen(root));
}
static int held(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return under(path);
}
static int folder(int fd) {
  struct stat about;
  return !fstat(fd, &about) && S_ISDIR(about.st_mode);
}
static int is_there(const char *path) {
  struct stat about;
  return !lstat(path, &about);
}

int symlink(const char *to, const char *at) {
  if (lacks("symlink") && under(at)) REFUSE;
  return REAL(symlink)(to, at);
}
int symlinkat(const char *to, int in, const char *at) {
  if (lacks("symlink") && under(at)) REFUSE;
  return REAL(symlinkat)(to, in, at);
}
int link(const char *from, const char *to) {
  if (lacks("link") && under(to)) REFUSE;
  return REAL(link)(from, to);
}
int linkat(int in, const char *from, int out, const char *to, int how) {
  if (lacks("link") && under(to)) REFUSE;
  return REAL(linkat)(in, from, out, to, how);
}
int flock(int fd, int how) {
  if (lacks("flock") && held(fd)) REFUSE;
  return REAL(flock)(fd, how);
}
int fsync(int fd) {
  if (lacks(folder(fd) ? "fsync of folders" : "fsync") && held(fd)) REFUSE;
  return REAL(fsync)(fd);
}
int fdatasync(int fd) {
  if (lacks("fsync") && held(fd)) REFUSE;
  return REAL(fdatasync)(fd);
}
int rename(const char *from, const char *to) {
  if (lacks("rename over a file") && under(to) && is_there(to)) REFUSE;
  return REAL(rename)(from, to);
}
int renameat(int in, const char *from, int out, const char *to) {
  if (lacks("rename over a file") && under(to) && is_there(to)) REFUSE;
  return REAL(renameat)(in, from, out, to);
}
int utimensat(int in, const char *path, const struct timespec times[2], int how) {
  if (lacks("utime") && under(path)) REFUSE;
  return REAL(utimensat)(in, path, times, how);
}
int futimens(int fd, const struct timespec times[2]) {
  if (lacks("utime") && held(fd)) REFUSE;
  return REAL(futimens)(fd, times);
}

struct iovec;
struct statvfs;
struct statfs;
#define READV(name, offset_type) \
  ssize_t name(int, const struct iovec *, int, offset_type); \
  ssize_t name(int fd, const struct iovec *parts, int count, offset_type at) { \
    if (lacks("preadv") && held(fd)) REFUSE; \
    return REAL(name)(fd, parts, count, at); \
  }
READV(preadv, off_t)
READV(preadv64, off64_t)
#define READV2(name, offset_type) \
  ssize_t name(int, const struct iovec *, int, offset_type, int); \
  ssize_t name(int fd, const struct iovec *parts, int count, offset_type at, int how) { \
    if (lacks("preadv") && held(fd)) REFUSE; \
    return REAL(name)(fd, parts, count, at, how); \
  }
READV2(preadv2, off_t)
READV2(preadv64v2, off64_t)
#define ABOUT(name, kind) \
  int name(const char *, struct kind *); \
  int name(const char *path, struct kind *into) { \
    if (lacks("statvfs") && under(path)) REFUSE; \
    return REAL(name)(path, into); \
  }
ABOUT(statvfs, statvfs)
ABOUT(statvfs64, statvfs)
ABOUT(statfs, statfs)
ABOUT(statfs64, statfs)
#define FABOUT(name, kind) \
  int name(int, struct kind *); \
  int name(int fd, struct kind *into) { \
    if (lacks("statvfs") && held(fd)) REFUSE; \
    return REAL(name)(fd, into); \
  }
FABOUT(fstatvfs, statvfs)
FABOUT(fstatvfs64, statvfs)
FABOUT(fstatfs, statfs)
FABOUT(fstatfs64, statfs)
#define MAP(name, offset_type) \
  void *name(void *, size_t, int, int, int, offset_type); \
  void *name(void *at, size_t size, int may, int how, int fd, offset_type from) { \
    if (fd >= 0 && lacks("mmap") && held(fd)) return errno = atoi(getenv("LACKS_ERRNO")), (void *)-1; \
    return REAL(name)(at, size, may, how, fd, from); \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

ssize_t write(int fd, const void *data, size_t size) {
  if (lacks("room") && held(fd)) REFUSE;
  return REAL(write)(fd, data, size);
}
ssize_t writev(int, const struct iovec *, int);
ssize_t writev(int fd, const struct iovec *parts, int count) {
  if (lacks("room") && held(fd)) REFUSE;
  return REAL(writev)(fd, parts, count);
}
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; \
    va_start(rest, flags); \
    int mode = va_arg(rest, int); \
    va_end(rest); \
    if (lacks("write") && under(path) && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) REFUSE; \
    return REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
int mkdir(const char *path, mode_t mode) {
  if (lacks("write") && under(path) && !is_there(path)) REFUSE;
  return REAL(mkdir)(path, mode);
}
int unlink(const char *path) {
  if (lacks("write") && under(path)) REFUSE;
  return REAL(unlink)(path);
}
