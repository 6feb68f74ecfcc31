/* Loaded before the C library by tests/faults: kills its process when it renames a file to a name, to the instruction.

   OFFSITE_DIE is "before NAME COUNT" or "after NAME COUNT": the COUNT-th rename to a path that ends in /NAME. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int meant(const char *path, char *moment)
{
    static int seen = 0;
    char name[256];
    int count;
    const char *order = getenv("OFFSITE_DIE"), *leaf = strrchr(path, '/');
    if (order == NULL || sscanf(order, "%15s %255s %d", moment, name, &count) != 3)
        return 0;
    return strcmp(leaf == NULL ? path : leaf + 1, name) == 0 && ++seen == count;
}

int rename(const char *from, const char *to)
{
    int (*original)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    char moment[16] = "";
    int now = meant(to, moment), result;
    if (now && strcmp(moment, "before") == 0)
        raise(SIGKILL);
    result = original(from, to);
    if (now)
        raise(SIGKILL);
    return result;
}
