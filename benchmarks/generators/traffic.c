/*
 * The two ends of a bulk stream: traffic source|sink ADDRESS [options].
 *
 * One block is sent over and over and one buffer received into, so that the
 * ends cost little and the relay between them is what is measured.  Each 4 KiB
 * of the stream begin with their own offset, which the receiver checks: bytes
 * that were lost, doubled or moved end the run.  With --verify it compares
 * every byte with what belongs there, for runs whose time does not count.
 *
 * With --duplex both ends send, and close when they have sent and received all.
 * Not every relay keeps one direction when the other has ended, so the last
 * block says that it is the last: its offsets have the highest bit set.
 */

#include "common.h"

#include <pthread.h>

#define BLOCK ((size_t)256 * 1024)
#define PAGE ((size_t)4096)
#define BUFFER ((size_t)1024 * 1024)
#define FINAL (UINT64_C(1) << 63)

/* Seconds between two entries of the history, from which the steady rate comes. */
#define INTERVAL 0.02
#define HISTORY 65536

static struct {
	double seconds;
	uint64_t bytes;
	bool verify, duplex;
	uint64_t stall_after;
	double stall_seconds;
} options = {.seconds = 2.0, .bytes = UINT64_MAX};

struct report {
	uint64_t bytes;
	double begin, end, steady;
};

static uint8_t pattern[BLOCK];

static void stamp(uint8_t *block, uint64_t offset, uint64_t mark)
{
	for (size_t place = 0; place < BLOCK; place += PAGE) {
		uint64_t value = (offset + place) | mark;

		memcpy(block + place, &value, sizeof value);
	}
}

/* Returns whether the last block has begun. */
static bool check_stamps(const uint8_t *data, size_t length, uint64_t offset)
{
	bool final = false;

	for (size_t place = -offset % PAGE; place + sizeof(uint64_t) <= length; place += PAGE) {
		uint64_t value;

		memcpy(&value, data + place, sizeof value);
		final = final || value & FINAL;
		if ((value & ~FINAL) != offset + place)
			fail("byte %" PRIu64 ": the bytes of %" PRIu64 " are here", offset + place, value);
	}
	return final;
}

static void verify_bytes(const uint8_t *data, size_t length, uint64_t offset)
{
	static __thread uint8_t expected[BLOCK];

	memcpy(expected, pattern, BLOCK);
	while (length) {
		size_t within = offset % BLOCK;
		size_t count = BLOCK - within < length ? BLOCK - within : length;

		stamp(expected, offset - within, 0);
		for (size_t i = 0; i < count && memcmp(data + i, expected + within + i, count - i); i++) {
			/* The mark of the last block, which would end the stream at once elsewhere. */
			uint8_t mark = (within + i) % PAGE == sizeof(uint64_t) - 1 ? 0x80 : 0;

			if ((data[i] & ~mark) != expected[within + i])
				fail("byte %" PRIu64 ": %02x instead of %02x", offset + i, data[i], expected[within + i]);
		}
		data += count;
		length -= count;
		offset += count;
	}
}

static struct report transmit(int fd)
{
	uint8_t *block = aligned_alloc(PAGE, BLOCK);
	struct report report = {.begin = now()};

	if (!block)
		fail("no memory");
	memcpy(block, pattern, BLOCK);
	while (report.bytes < options.bytes && now() - report.begin < options.seconds) {
		stamp(block, report.bytes, 0);
		send_all(fd, block, BLOCK);
		report.bytes += BLOCK;
	}
	if (options.duplex) {
		stamp(block, report.bytes, FINAL);
		send_all(fd, block, BLOCK);
		report.bytes += BLOCK;
	} else {
		shutdown(fd, SHUT_WR);
	}
	report.end = now();
	free(block);
	return report;
}

static void stall_at(uint64_t received)
{
	static bool done;

	if (!done && options.stall_seconds > 0 && received >= options.stall_after) {
		struct timespec time = {.tv_sec = (time_t)options.stall_seconds};

		time.tv_nsec = (long)(1e9 * (options.stall_seconds - (double)time.tv_sec));
		nanosleep(&time, NULL);
		done = true;
	}
}

/* Bytes per second from half of the time on: without the start. */
static double steady_rate(const double *times, const uint64_t *bytes, size_t entries, struct report whole)
{
	double half = (whole.begin + whole.end) / 2;
	size_t first = 0;

	while (first < entries && times[first] < half)
		first++;
	if (first == entries || whole.end <= times[first])
		return 0;
	return (double)(whole.bytes - bytes[first]) / (whole.end - times[first]);
}

static struct report take(int fd)
{
	static double times[HISTORY];
	static uint64_t bytes[HISTORY];
	size_t entries = 0, count;
	uint8_t *buffer = aligned_alloc(PAGE, BUFFER);
	struct report report = {0};
	double last = 0;
	bool final = false;

	if (!buffer)
		fail("no memory");
	while ((!final || report.bytes % BLOCK) && (count = receive_some(fd, buffer, BUFFER))) {
		double time = now();

		if (!report.bytes)
			report.begin = time;
		final = check_stamps(buffer, count, report.bytes) || final;
		if (options.verify)
			verify_bytes(buffer, count, report.bytes);
		report.bytes += count;
		if (time - last >= INTERVAL && entries < HISTORY) {
			times[entries] = last = time;
			bytes[entries++] = report.bytes;
		}
		stall_at(report.bytes);
	}
	report.end = now();
	if (!report.bytes)
		report.begin = report.end;
	report.steady = steady_rate(times, bytes, entries, report);
	free(buffer);
	return report;
}

struct job {
	int fd;
	struct report sent;
};

static void *transmit_thread(void *argument)
{
	struct job *job = argument;

	job->sent = transmit(job->fd);
	return NULL;
}

static void print_report(const char *name, struct report report)
{
	printf("\"%s\": {\"total_bytes\": %" PRIu64 ", \"begin\": %.9f, \"end\": %.9f, \"steady\": %.1f}", name,
	       report.bytes, report.begin, report.end, report.steady);
}

static void parse_options(int count, char **arguments)
{
	for (int i = 0; i < count; i++) {
		const char *name = arguments[i];

		if (!strcmp(name, "--verify")) {
			options.verify = true;
			continue;
		}
		if (!strcmp(name, "--duplex")) {
			options.duplex = true;
			continue;
		}
		if (++i == count)
			fail("%s: no such option, or its value is missing", name);
		if (!strcmp(name, "--seconds"))
			options.seconds = atof(arguments[i]);
		else if (!strcmp(name, "--bytes"))
			options.bytes = strtoull(arguments[i], NULL, 10);
		else if (!strcmp(name, "--stall-after"))
			options.stall_after = strtoull(arguments[i], NULL, 10);
		else if (!strcmp(name, "--stall-seconds"))
			options.stall_seconds = atof(arguments[i]);
		else
			fail("%s: no such option", name);
	}
}

int main(int count, char **arguments)
{
	if (count < 3 || (strcmp(arguments[1], "source") && strcmp(arguments[1], "sink")))
		fail("usage: traffic source|sink PATH|PORT [--seconds S] [--bytes N] [--verify] [--duplex]"
		     " [--stall-after BYTES --stall-seconds S]");
	parse_options(count - 3, arguments + 3);
	fill_random(pattern, BLOCK);

	bool source = !strcmp(arguments[1], "source");
	struct job job = {.fd = source ? dial(arguments[2]) : accept_one(listen_at(arguments[2]))};
	pthread_t thread;

	if (options.duplex && pthread_create(&thread, NULL, transmit_thread, &job))
		fail("no thread");
	if (source && !options.duplex)
		job.sent = transmit(job.fd);

	struct report received = take(job.fd);

	if (options.duplex)
		pthread_join(thread, NULL);
	else if (source && received.bytes)
		fail("the sink does not send, yet bytes came back");
	printf("{");
	print_report("sent", job.sent);
	printf(", ");
	print_report("received", received);
	printf("}\n");
	return 0;
}
