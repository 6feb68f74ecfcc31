/* Loaded before the C library by tests/faults/test_quiet.py: writes down every address that a process asks for. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const char *host, int port)
{
    const char *path = getenv("OFFSITE_WATCH");
    char line[512];
    int file, length;
    if (path == NULL || (file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
        return;
    length = snprintf(line, sizeof line, "%d %s %s %d\n", (int) getpid(), call, host, port);
    if (length > 0 && write(file, line, (size_t) length) < 0)
        abort(); /* an audit that misses something is none */
    close(file);
}

static void note_address(const char *call, const struct sockaddr *address)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (address == NULL)
        return;
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *four = (const struct sockaddr_in *) address;
        inet_ntop(AF_INET, &four->sin_addr, host, sizeof host);
        note(call, host, ntohs(four->sin_port));
    } else if (address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const struct sockaddr_in6 *) address;
        inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof host);
        note(call, host, ntohs(six->sin6_port));
    }
}

int connect(int descriptor, const struct sockaddr *address, socklen_t length)
{
    int (*original)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    note_address("connect", address);
    return original(descriptor, address, length);
}

int bind(int descriptor, const struct sockaddr *address, socklen_t length)
{
    int (*original)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    note_address("bind", address);
    return original(descriptor, address, length);
}

ssize_t sendto(int descriptor, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length)
{
    ssize_t (*original)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    note_address("sendto", address);
    return original(descriptor, data, size, flags, address, length);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    int (*original)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (node != NULL)
        note("lookup", node, 0);
    return original(node, service, hints, found);
}
