/* Notes what is on disk, for power_cut.py: loaded before libc (LD_PRELOAD), it stands in for fsync and fdatasync.

   POWER_CUT_ROOT   what lies below this directory is noted
   POWER_CUT_STORE  a file for each inode that was synced: a file's content, or a directory's "inode kind name" lines
   POWER_CUT_EVERY  the process stops itself (SIGSTOP) before every so many-th sync */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count;

static int below_root(int fd) {
  char link[64], path[PATH_MAX];
  const char *root = getenv("POWER_CUT_ROOT");
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (!root || length < 0) return 0;
  path[length] = 0;
  size_t n = strlen(root);
  return !strncmp(path, root, n) && (!path[n] || path[n] == '/');
}

static void write_content(int from, FILE *to) {
  char link[64], piece[65536];
  snprintf(link, sizeof link, "/proc/self/fd/%d", from); /* `from` may be open for writing only */
  int fd = open(link, O_RDONLY);
  for (ssize_t n; fd >= 0 && (n = read(fd, piece, sizeof piece)) > 0;) fwrite(piece, 1, n, to);
  close(fd);
}

static void write_names(int from, FILE *to) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", from);
  DIR *directory = opendir(link);
  for (struct dirent *entry; directory && (entry = readdir(directory));)
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
      fprintf(to, "%lu %c %s\n", entry->d_ino, entry->d_type == DT_DIR ? 'd' : 'f', entry->d_name);
  if (directory) closedir(directory);
}

static int noted(const char *name, int fd) {
  int (*sync)(int) = dlsym(RTLD_NEXT, name);
  struct stat info;
  if (!below_root(fd) || fstat(fd, &info)) return sync(fd);
  pthread_mutex_lock(&lock);
  char path[PATH_MAX], aside[PATH_MAX];
  snprintf(path, sizeof path, "%s/%lu", getenv("POWER_CUT_STORE"), info.st_ino);
  snprintf(aside, sizeof aside, "%s.tmp", path);
  if (++count % atol(getenv("POWER_CUT_EVERY")) == 0) kill(getpid(), SIGSTOP);
  if (access(path, F_OK)) dup(fd); /* for ever: the inode's number must not be given to another file */
  FILE *file = fopen(aside, "w");
  if (!file) abort();
  (S_ISDIR(info.st_mode) ? write_names : write_content)(fd, file);
  if (fclose(file)) abort();
  int result = sync(fd);
  if (!result && rename(aside, path)) abort();
  pthread_mutex_unlock(&lock);
  return result;
}

int fsync(int fd) { return noted("fsync", fd); }
int fdatasync(int fd) { return noted("fdatasync", fd); }

__attribute__((constructor)) static void many_descriptors(void) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit)) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}
