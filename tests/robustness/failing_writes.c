/* A library for LD_PRELOAD that counts what a program writes below a folder, and lets one of these calls fail.

   FAULT_FOLDER   the folder, without links in its path; without it nothing is counted and nothing fails
   FAULT_LOG      a file outside of it, to which each counted call adds a line of WIDTH bytes: "write run/train.log".
                  Its length is the number of calls so far, over all processes.
   FAULT_CALL     where set, such a line or a pattern of a shell: only these calls are counted
   FAULT_NUMBER   the number of the call that fails, from 1 on
   FAULT_ERROR    its errno; "short" lets a call that writes several bytes write half of them

   What libc calls within itself is not seen, such as the write() of a buffered FILE. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WIDTH = 512, NO_FAULT = 0, SHORT = -1 };

/* Count a call and return the error with which it is to fail, SHORT or NO_FAULT. */
static int count(const char *function, const char *path)
{
    const char *folder = getenv("FAULT_FOLDER"), *log = getenv("FAULT_LOG"), *only = getenv("FAULT_CALL");
    const char *number = getenv("FAULT_NUMBER"), *error = getenv("FAULT_ERROR");
    size_t length = folder ? strlen(folder) : 0;
    if (!folder || !log || strncmp(path, folder, length) || path[length] != '/')
        return NO_FAULT;
    char line[WIDTH + 1];
    snprintf(line, sizeof line, "%s %s", function, path + length + 1);
    if (only && fnmatch(only, line, 0))
        return NO_FAULT;
    size_t used = strlen(line);
    memset(line + used, ' ', WIDTH - used);
    line[WIDTH - 1] = '\n';
    int saved = errno, file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    syscall(SYS_write, file, line, WIDTH);
    long calls = lseek(file, 0, SEEK_CUR) / WIDTH;
    syscall(SYS_close, file);
    errno = saved;
    if (!number || calls != atol(number))
        return NO_FAULT;
    return strcmp(error, "short") ? atoi(error) : SHORT;
}

static int count_descriptor(const char *function, int descriptor)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return NO_FAULT;
    path[length] = 0;
    return count(function, path);
}

static int count_path(const char *function, int folder, const char *name)
{
    char link[64] = "/proc/self/cwd", path[2 * PATH_MAX];
    if (name[0] == '/')
        return count(function, name);
    if (folder != AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return NO_FAULT;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return count(function, path);
}

#define REAL(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))

/* Return from the surrounding function as a call of the system that has failed, if this one is to fail. */
#define FAIL_IF(fault, failed)                                                                                         \
    do {                                                                                                               \
        int code = fault;                                                                                              \
        if (code > 0) {                                                                                                \
            errno = code;                                                                                              \
            return failed;                                                                                             \
        }                                                                                                              \
    } while (0)

/* Calls that write some bytes. */
#define WRITES(function, parameters, arguments, descriptor, size)                                                      \
    ssize_t function parameters                                                                                        \
    {                                                                                                                  \
        int fault = count_descriptor(#function, descriptor);                                                           \
        FAIL_IF(fault, -1);                                                                                            \
        if (fault == SHORT && size > 1)                                                                                \
            size /= 2;                                                                                                 \
        return REAL(function) arguments;                                                                               \
    }

WRITES(write, (int file, const void *bytes, size_t size), (file, bytes, size), file, size)
WRITES(pwrite, (int file, const void *bytes, size_t size, off_t at), (file, bytes, size, at), file, size)
WRITES(pwrite64, (int file, const void *bytes, size_t size, off64_t at), (file, bytes, size, at), file, size)
WRITES(writev, (int file, const struct iovec *parts, int num_parts), (file, parts, num_parts), file, num_parts)
WRITES(sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size), file, size)
WRITES(sendfile64, (int file, int from, off64_t *at, size_t size), (file, from, at, size), file, size)
WRITES(copy_file_range, (int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags),
       (from, at, file, to, size, flags), file, size)

/* Other calls on an open file. */
#define CHANGES(function, parameters, arguments, descriptor)                                                           \
    int function parameters                                                                                            \
    {                                                                                                                  \
        FAIL_IF(count_descriptor(#function, descriptor), -1);                                                          \
        return REAL(function) arguments;                                                                               \
    }

CHANGES(fsync, (int file), (file), file)
CHANGES(fdatasync, (int file), (file), file)
CHANGES(ftruncate, (int file, off_t size), (file, size), file)
CHANGES(ftruncate64, (int file, off64_t size), (file, size), file)

int posix_fallocate(int file, off_t at, off_t size) /* returns its error */
{
    int fault = count_descriptor("posix_fallocate", file);
    return fault > 0 ? fault : REAL(posix_fallocate)(file, at, size);
}

int posix_fallocate64(int file, off64_t at, off64_t size)
{
    int fault = count_descriptor("posix_fallocate64", file);
    return fault > 0 ? fault : REAL(posix_fallocate64)(file, at, size);
}

int close(int file) /* which tells on file servers that what was written does not fit; the file is closed then, too */
{
    int flags = fcntl(file, F_GETFL), fault = NO_FAULT;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY)
        fault = count_descriptor("close", file);
    int result = REAL(close)(file);
    FAIL_IF(fault, -1);
    return result;
}

/* Calls on names. Of two names it is the new one that counts. */
#define NAMES(function, parameters, arguments, folder, name)                                                           \
    int function parameters                                                                                            \
    {                                                                                                                  \
        FAIL_IF(count_path(#function, folder, name), -1);                                                              \
        return REAL(function) arguments;                                                                               \
    }

NAMES(rename, (const char *old, const char *name), (old, name), AT_FDCWD, name)
NAMES(renameat, (int above, const char *old, int folder, const char *name), (above, old, folder, name), folder, name)
NAMES(renameat2, (int above, const char *old, int folder, const char *name, unsigned flags),
      (above, old, folder, name, flags), folder, name)
NAMES(mkdir, (const char *name, mode_t mode), (name, mode), AT_FDCWD, name)
NAMES(mkdirat, (int folder, const char *name, mode_t mode), (folder, name, mode), folder, name)
NAMES(link, (const char *old, const char *name), (old, name), AT_FDCWD, name)
NAMES(linkat, (int above, const char *old, int folder, const char *name, int flags),
      (above, old, folder, name, flags), folder, name)
NAMES(symlink, (const char *old, const char *name), (old, name), AT_FDCWD, name)
NAMES(symlinkat, (const char *old, int folder, const char *name), (old, folder, name), folder, name)
NAMES(truncate, (const char *name, off_t size), (name, size), AT_FDCWD, name)
NAMES(truncate64, (const char *name, off64_t size), (name, size), AT_FDCWD, name)

/* Opening for writing. */
#define OPENS(function, label, parameters, arguments, folder)                                                          \
    int function parameters                                                                                            \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                  \
        if ((flags & O_ACCMODE) != O_RDONLY)                                                                           \
            FAIL_IF(count_path(label, folder, name), -1);                                                              \
        return REAL(function) arguments;                                                                               \
    }

OPENS(open, "open", (const char *name, int flags, ...), (name, flags, mode), AT_FDCWD)
OPENS(open64, "open", (const char *name, int flags, ...), (name, flags, mode), AT_FDCWD)
OPENS(openat, "open", (int folder, const char *name, int flags, ...), (folder, name, flags, mode), folder)
OPENS(openat64, "open", (int folder, const char *name, int flags, ...), (folder, name, flags, mode), folder)

#define OPENS_STREAM(function)                                                                                         \
    FILE *function(const char *name, const char *mode)                                                                 \
    {                                                                                                                  \
        if (strpbrk(mode, "wa+"))                                                                                      \
            FAIL_IF(count_path("open", AT_FDCWD, name), NULL);                                                         \
        return REAL(function)(name, mode);                                                                             \
    }

OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)
