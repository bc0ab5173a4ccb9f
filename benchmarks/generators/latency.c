/*
 * Requests and responses, one at a time: latency echo|ask|dial|hold ADDRESS [options].
 *
 * echo   listens, and sends back whatever it gets, to all who connect.
 * ask    has one connection, and asks over it again and again.
 * dial   connects, asks for one byte, and closes, again and again.
 * hold   opens many connections, asks one byte over each, says "ready" and
 *        keeps them until its standard input ends.
 *
 * Every answer is compared with what was asked.
 */

#include "common.h"

#include <poll.h>

#define MOST_CONNECTIONS 4096
#define MOST_BYTES ((size_t)1024 * 1024)
#define MOST_SAMPLES ((size_t)16 * 1024 * 1024)

static struct {
	double seconds;
	size_t size, count;
} options = {.seconds = 2.0, .size = 64, .count = 1};

static uint8_t request[MOST_BYTES], response[MOST_BYTES];

static void echo(const char *address)
{
	static struct pollfd fds[MOST_CONNECTIONS + 1];
	nfds_t used = 1;

	fds[0] = (struct pollfd){.fd = listen_at(address), .events = POLLIN};
	for (;;) {
		fds[0].events = used <= MOST_CONNECTIONS ? POLLIN : 0;
		if (poll(fds, used, -1) < 0 && errno != EINTR)
			fail("poll: %s", strerror(errno));
		for (nfds_t i = used - 1; i > 0; i--) {
			ssize_t count;

			if (!fds[i].revents)
				continue;
			count = recv(fds[i].fd, response, MOST_BYTES, 0);
			if (count > 0) {
				send_all(fds[i].fd, response, (size_t)count);
			} else {
				close(fds[i].fd);
				fds[i] = fds[--used];
			}
		}
		if (fds[0].revents & POLLIN)
			fds[used++] = (struct pollfd){.fd = accept_one(fds[0].fd), .events = POLLIN};
	}
}

static void exchange(int fd, size_t size, uint64_t number)
{
	size_t received = 0;

	memcpy(request, &number, size < sizeof number ? size : sizeof number);
	send_all(fd, request, size);
	while (received < size) {
		size_t count = receive_some(fd, response + received, size - received);

		if (!count)
			fail("the stream ended before the answer to request %" PRIu64, number);
		received += count;
	}
	if (memcmp(request, response, size))
		fail("the answer to request %" PRIu64 " is not what was asked", number);
}

static int compare(const void *left, const void *right)
{
	float a = *(const float *)left, b = *(const float *)right;

	return (a > b) - (a < b);
}

static void print_samples(float *samples, size_t count, double seconds)
{
	if (!count)
		fail("not one answer in %g s", options.seconds);
	qsort(samples, count, sizeof *samples, compare);
	printf("{\"count\": %zu, \"seconds\": %.6f, \"p50\": %.9f, \"p99\": %.9f, \"max\": %.9f}\n", count, seconds,
	       samples[count / 2], samples[count * 99 / 100], samples[count - 1]);
}

/* Takes turns for as long as it is to; each turn is one sample. */
static void sample(const char *address, bool redial)
{
	float *samples = malloc(MOST_SAMPLES * sizeof *samples);
	size_t count = 0;
	int fd = redial ? -1 : dial(address);
	double begin, last;

	if (!samples)
		fail("no memory");
	if (!redial)
		exchange(fd, options.size, count);
	begin = last = now();
	while (last - begin < options.seconds && count < MOST_SAMPLES) {
		double time;

		if (redial)
			fd = dial(address);
		exchange(fd, options.size, count + 1);
		if (redial)
			close(fd);
		time = now();
		samples[count++] = (float)(time - last);
		last = time;
	}
	print_samples(samples, count, last - begin);
}

static void hold(const char *address)
{
	char byte;

	for (size_t i = 0; i < options.count; i++)
		exchange(dial(address), 1, i);
	printf("ready\n");
	fflush(stdout);
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
}

int main(int count, char **arguments)
{
	if (count < 3)
		fail("usage: latency echo|ask|dial|hold PATH|PORT [--seconds S] [--size BYTES] [--count N]");
	for (int i = 3; i + 1 < count; i += 2) {
		if (!strcmp(arguments[i], "--seconds"))
			options.seconds = atof(arguments[i + 1]);
		else if (!strcmp(arguments[i], "--size"))
			options.size = strtoull(arguments[i + 1], NULL, 10);
		else if (!strcmp(arguments[i], "--count"))
			options.count = strtoull(arguments[i + 1], NULL, 10);
		else
			fail("%s: no such option", arguments[i]);
	}
	if (options.size < 1 || options.size > MOST_BYTES)
		fail("--size: from 1 to %zu", MOST_BYTES);
	fill_random(request, sizeof request);
	if (!strcmp(arguments[1], "echo"))
		echo(arguments[2]);
	else if (!strcmp(arguments[1], "ask"))
		sample(arguments[2], false);
	else if (!strcmp(arguments[1], "dial"))
		options.size = 1, sample(arguments[2], true);
	else if (!strcmp(arguments[1], "hold"))
		hold(arguments[2]);
	else
		fail("%s: neither echo nor ask, dial or hold", arguments[1]);
	return 0;
}
