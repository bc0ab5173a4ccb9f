/* What the generators share: sockets by address, a clock, and errors that end the program. */

#ifndef RELAYMUX_BENCHMARK_COMMON_H
#define RELAYMUX_BENCHMARK_COMMON_H

#define _GNU_SOURCE

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

/* Seconds of CLOCK_MONOTONIC, which all processes of a machine share. */
static inline double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

union address {
	struct sockaddr any;
	struct sockaddr_un local;
	struct sockaddr_in tcp;
};

/* TEXT is the path of a UNIX socket, or the number of a TCP port of 127.0.0.1. */
static inline socklen_t parse_address(const char *text, union address *address)
{
	memset(address, 0, sizeof *address);
	if (strchr(text, '/')) {
		if (strlen(text) >= sizeof address->local.sun_path)
			fail("%s: too long for a UNIX socket", text);
		address->local.sun_family = AF_UNIX;
		strcpy(address->local.sun_path, text);
		return sizeof address->local;
	}
	address->tcp.sin_family = AF_INET;
	address->tcp.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	address->tcp.sin_port = htons((uint16_t)atoi(text));
	return sizeof address->tcp;
}

static inline void no_delay(int fd, const union address *address)
{
	int yes = 1;

	if (address->any.sa_family == AF_INET)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

static inline int dial(const char *text)
{
	union address address;
	socklen_t length = parse_address(text, &address);
	int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, &address.any, length))
		fail("%s: %s", text, strerror(errno));
	no_delay(fd, &address);
	return fd;
}

/* A UNIX socket gets its name when it listens: who has seen the name can connect. */
static inline int listen_at(const char *text)
{
	char unnamed[PATH_MAX];
	int local = strchr(text, '/') != NULL;
	snprintf(unnamed, sizeof unnamed, "%s%s", text, local ? "~" : "");
	union address address;
	socklen_t length = parse_address(unnamed, &address);
	int yes = 1;
	int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	/* A relay may run as another user; the directory keeps everybody else out. */
	umask(0);
	if (fd >= 0 && address.any.sa_family == AF_INET)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (fd < 0 || bind(fd, &address.any, length) || listen(fd, 1024) ||
	    (local && rename(unnamed, text)))
		fail("%s: %s", text, strerror(errno));
	return fd;
}

static inline int accept_one(int port)
{
	union address address = {0};
	socklen_t length = sizeof address;
	int fd = accept4(port, &address.any, &length, SOCK_CLOEXEC);

	if (fd < 0)
		fail("accept: %s", strerror(errno));
	no_delay(fd, &address);
	return fd;
}

static inline void send_all(int fd, const uint8_t *data, size_t length)
{
	while (length) {
		ssize_t count = send(fd, data, length, MSG_NOSIGNAL);

		if (count < 0 && errno != EINTR)
			fail("send: %s", strerror(errno));
		if (count > 0) {
			data += count;
			length -= (size_t)count;
		}
	}
}

/* Returns the number of bytes, 0 at the end of the stream. */
static inline size_t receive_some(int fd, uint8_t *buffer, size_t length)
{
	ssize_t count;

	do
		count = recv(fd, buffer, length, 0);
	while (count < 0 && errno == EINTR);
	if (count < 0)
		fail("receive: %s", strerror(errno));
	return (size_t)count;
}

/* Incompressible, and the same in every run. */
static inline void fill_random(uint8_t *buffer, size_t length)
{
	uint64_t state = 0x9e3779b97f4a7c15u;

	for (size_t i = 0; i < length; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		buffer[i] = (uint8_t)(state >> 32);
	}
}

#endif
