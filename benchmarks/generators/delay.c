/*
 * A long line between two TCP ports of this machine:
 *
 *     delay PORT TARGET-PORT [--seconds ONE-WAY] [--rate BYTES-PER-SECOND]
 *
 * What arrives at PORT goes on to TARGET-PORT, and back, after a while each
 * way and no faster than the rate.  There is room for as much as is on its way
 * (up to 1 GiB each way; if that is too little it says so and ends), and little
 * beside it: the sender notices that the line is full, as it would from a short
 * queue.
 */

#include "common.h"

#include <pthread.h>
#include <sys/mman.h>

#define CHUNK ((size_t)256 * 1024)
#define CHUNKS 4096

/* Seconds of the rate that may queue for the line itself. */
#define QUEUE 0.005

/* Seconds of the rate that are read at once. */
#define STEP 0.0005

static struct {
	double seconds, rate;
} options;

struct chunk {
	uint8_t *data;
	size_t length; /* 0 is the end of the stream */
	double due;
};

/* One direction: its reader puts chunks in, its writer takes them out when they are due. */
struct direction {
	int from, to;
	pthread_t reader, writer;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct chunk queue[CHUNKS];
	size_t head, used;
	/* Last in, first out, so that a short line stays within the processor's caches. */
	uint8_t *spare[CHUNKS];
	size_t spares;
	uint8_t *memory;
};

static void sleep_until(double moment)
{
	struct timespec time = {.tv_sec = (time_t)moment};

	time.tv_nsec = (long)((moment - (double)time.tv_sec) * 1e9);
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR)
		;
}

static void put(struct direction *direction, struct chunk chunk)
{
	pthread_mutex_lock(&direction->lock);
	direction->queue[(direction->head + direction->used++) % CHUNKS] = chunk;
	pthread_cond_signal(&direction->changed);
	pthread_mutex_unlock(&direction->lock);
}

static void *read_all(void *argument)
{
	struct direction *direction = argument;
	size_t most = CHUNK;
	double line_free = 0;

	if (options.rate > 0 && options.rate * STEP < (double)CHUNK)
		most = (size_t)(options.rate * STEP) + 1;
	for (;;) {
		struct chunk chunk;
		ssize_t count;
		double time;

		pthread_mutex_lock(&direction->lock);
		/* One place stays free for the end of the stream. */
		while (!direction->spares || direction->used >= CHUNKS - 1) {
			/* Full since the far end does not read is as it should be. */
			if (direction->used && direction->queue[direction->head].due > now())
				fail("more is on its way than there is room for");
			pthread_cond_wait(&direction->changed, &direction->lock);
		}
		chunk.data = direction->spare[--direction->spares];
		pthread_mutex_unlock(&direction->lock);
		do
			count = recv(direction->from, chunk.data, most, 0);
		while (count < 0 && errno == EINTR);
		time = now();
		if (options.rate > 0 && count > 0) {
			if (line_free < time)
				line_free = time;
			line_free += (double)count / options.rate;
		}
		chunk.length = count > 0 ? (size_t)count : 0;
		chunk.due = (line_free > time ? line_free : time) + options.seconds;
		put(direction, chunk);
		if (!chunk.length)
			return NULL;
		if (line_free > time + QUEUE)
			sleep_until(line_free - QUEUE);
	}
}

static void *write_all(void *argument)
{
	struct direction *direction = argument;

	for (;;) {
		struct chunk chunk;

		pthread_mutex_lock(&direction->lock);
		while (!direction->used)
			pthread_cond_wait(&direction->changed, &direction->lock);
		chunk = direction->queue[direction->head];
		direction->head = (direction->head + 1) % CHUNKS;
		direction->used--;
		pthread_mutex_unlock(&direction->lock);
		if (chunk.due > now())
			sleep_until(chunk.due);
		if (!chunk.length) {
			shutdown(direction->to, SHUT_WR);
			return NULL;
		}
		for (size_t sent = 0; sent < chunk.length;) {
			ssize_t count = send(direction->to, chunk.data + sent, chunk.length - sent, MSG_NOSIGNAL);

			if (count < 0 && errno != EINTR) {
				/* Nobody takes it any more: let the reader notice, and drop the rest. */
				shutdown(direction->from, SHUT_RD);
				break;
			}
			sent += count > 0 ? (size_t)count : 0;
		}
		pthread_mutex_lock(&direction->lock);
		direction->spare[direction->spares++] = chunk.data;
		pthread_cond_signal(&direction->changed);
		pthread_mutex_unlock(&direction->lock);
	}
}

static struct direction *start(int from, int to)
{
	struct direction *direction = calloc(1, sizeof *direction);

	if (!direction)
		fail("no memory");
	direction->from = from;
	direction->to = to;
	direction->memory = mmap(NULL, CHUNK * CHUNKS, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (direction->memory == MAP_FAILED)
		fail("no memory for %d chunks", CHUNKS);
	for (size_t i = 0; i < CHUNKS; i++)
		direction->spare[direction->spares++] = direction->memory + i * CHUNK;
	pthread_mutex_init(&direction->lock, NULL);
	pthread_cond_init(&direction->changed, NULL);
	if (pthread_create(&direction->reader, NULL, read_all, direction) ||
	    pthread_create(&direction->writer, NULL, write_all, direction))
		fail("no thread");
	return direction;
}

static void finish(struct direction *direction)
{
	pthread_join(direction->reader, NULL);
	pthread_join(direction->writer, NULL);
	munmap(direction->memory, CHUNK * CHUNKS);
	free(direction);
}

struct pair {
	int near;
	const char *target;
};

static void *carry(void *argument)
{
	struct pair *pair = argument;
	int far = dial(pair->target);
	struct direction *there = start(pair->near, far), *back = start(far, pair->near);

	finish(there);
	finish(back);
	close(pair->near);
	close(far);
	free(pair);
	return NULL;
}

int main(int count, char **arguments)
{
	if (count < 3)
		fail("usage: delay PORT TARGET-PORT [--seconds ONE-WAY] [--rate BYTES-PER-SECOND]");
	for (int i = 3; i + 1 < count; i += 2) {
		if (!strcmp(arguments[i], "--seconds"))
			options.seconds = atof(arguments[i + 1]);
		else if (!strcmp(arguments[i], "--rate"))
			options.rate = atof(arguments[i + 1]);
		else
			fail("%s: no such option", arguments[i]);
	}

	int port = listen_at(arguments[1]);

	for (;;) {
		struct pair *pair = malloc(sizeof *pair);
		pthread_t thread;

		if (!pair)
			fail("no memory");
		*pair = (struct pair){.near = accept_one(port), .target = arguments[2]};
		if (pthread_create(&thread, NULL, carry, pair))
			fail("no thread");
		pthread_detach(thread);
	}
}
