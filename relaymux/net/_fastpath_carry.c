/* What is carried: frames to the link, and from there, as docs/protocol.md has them. */

#include "_fastpath.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

#define MAX_OFFSET INT64_MAX

/* An ACK rides along from this share of what is worth one, as in relaymux/core/outbox.py. */
#define ACK_RIDE_SHARE 4

/* Kinds of frames (docs/protocol.md, 3). */
enum { ACK = 0x06, DATA = 0x13, CREDIT = 0x14 };

void watch(const Lease *lease, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(lease->epoll, EPOLL_CTL_MOD, fd, &event);
}

static uint64_t get64(const unsigned char *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return be64toh(value);
}

static uint32_t get32(const unsigned char *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return be32toh(value);
}

static void put64(unsigned char *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, sizeof value);
}

static void put_header(unsigned char *at, int kind, uint32_t id, uint32_t length)
{
    memset(at, 0, HEADER);
    at[0] = kind;
    id = htobe32(id);
    memcpy(at + 4, &id, sizeof id);
    length = htobe32(length);
    memcpy(at + 8, &length, sizeof length);
}

/* A place for one more frame, kept until it is acknowledged; the caller has looked whether there is one. */
static Sent *keep(Lease *lease, Py_ssize_t length)
{
    Sent *sent = &lease->sent[(lease->first + lease->sent_count++) % MOST_SENT];
    lease->end += length;
    lease->room -= length + lease->frame_cost;
    sent->end = lease->end;
    sent->payload.count = 0;
    sent->payload.length = 0;
    return sent;
}

/* Forget frames up to `offset`, which is the end of one of them.  -1: it is not. */
static int acknowledge(Lease *lease, uint64_t offset)
{
    if (offset == lease->acknowledged)
        return 0;
    if (offset < lease->acknowledged || offset > lease->end)
        return -1;
    Py_ssize_t before = lease->first_end;
    while (before < lease->end_count && lease->ends[before] < offset)
        before++;
    if (offset <= lease->settled_end) {
        if (before == lease->end_count || lease->ends[before] != offset)
            return -1;
        before++;
    } else {
        int last = 0;
        while (last < lease->sent_count && lease->sent[(lease->first + last) % MOST_SENT].end < offset)
            last++;
        if (lease->sent[(lease->first + last) % MOST_SENT].end != offset)
            return -1;
        for (; last >= 0; last--) {
            drop(&lease->sent[lease->first].payload);
            lease->first = (lease->first + 1) % MOST_SENT;
            lease->sent_count--;
            lease->room += lease->frame_cost;
        }
    }
    lease->room += (before - lease->first_end) * lease->frame_cost;
    lease->first_end = before;
    lease->room += offset - lease->acknowledged;
    lease->acknowledged = offset;
    return 0;
}

/* An exception that waits, or none: what is called meanwhile may have its own. */
typedef struct {
    PyObject *type, *value, *traceback;
} Error;

static Error keep_error(void)
{
    Error error;
    PyErr_Fetch(&error.type, &error.value, &error.traceback);
    return error;
}

/* -1 with an exception: the one of what has `failed` meanwhile, or else `error`; 0 if there is none. */
static int raise_again(Error error, int failed)
{
    if (!failed) {
        PyErr_Restore(error.type, error.value, error.traceback);
        return error.type ? -1 : 0;
    }
    Py_XDECREF(error.type);
    Py_XDECREF(error.value);
    Py_XDECREF(error.traceback);
    return -1;
}

/* Write what is in `unsent`; what the link does not take waits until it does. */
static void push(Lease *lease)
{
    put(lease->fd, &lease->unsent, &lease->write_end);
    if (lease->write_end) {
        lease->over = 1;
    } else if (lease->unsent.count && !lease->blocked) {
        lease->blocked = 1;
        watch(lease, lease->fd, EPOLLIN | EPOLLOUT);
    } else if (!lease->unsent.count && lease->blocked) {
        lease->blocked = 0;
        watch(lease, lease->fd, EPOLLIN);
    }
}

/*
 * Have frames written, and encrypted before where the link is, if it was not blocked.  -1 with an exception: it
 * can say nothing more.
 */
static int say(Lease *lease, Pieces *frames)
{
    int failed = 0;
    if (lease->sealer) {
        Output output = {.pool = lease->ciphers, .pieces = &lease->unsent};
        failed = seal(lease->sealer, frames, APPLICATION_DATA, &output);
        drop(frames);
    } else {
        lease->unsent = *frames;
    }
    if (failed) {
        /* What follows must not be taken for what follows the frames before: the next connection repeats these. */
        drop(&lease->unsent);
        lease->write_end = EIO;
        lease->over = 1;
        return -1;
    }
    push(lease);
    return 0;
}

/* An ACK, at `at`.  Returns its length. */
static int put_ack(Lease *lease, unsigned char *at)
{
    put_header(at, ACK, 0, OFFSET);
    put64(at + HEADER, lease->rx_next);
    lease->rx_acknowledged = lease->rx_next;
    return ACK_FRAME;
}

/*
 * Say what is due: CREDIT, and ACK, which rides along where that is worthwhile.  See Link.data_to_send.  -1 with
 * an exception.
 */
static int answer(Lease *lease)
{
    if (lease->blocked)
        return 0;
    unsigned char *at = lease->credits;
    int due = 0;
    for (int i = 0; i < lease->stream_count; i++)
        due += lease->streams[i].credit_due;
    uint64_t new_bytes = lease->rx_next - lease->rx_acknowledged;
    if (new_bytes >= (due ? lease->ack_bytes / ACK_RIDE_SHARE : lease->ack_bytes))
        at += put_ack(lease, at);
    for (int i = 0; due && i < lease->stream_count; i++) {
        Stream *stream = &lease->streams[i];
        if (!stream->credit_due)
            continue;
        if (lease->sent_count == MOST_SENT || lease->end - lease->acknowledged >= lease->most_held) {
            lease->over = 1; /* the rest is said by Python */
            break;
        }
        Sent *sent = keep(lease, CREDIT_FRAME);
        stream->credit_due = 0;
        stream->granted = stream->consumed + stream->size;
        sent->head_length = CREDIT_FRAME;
        put_header(sent->head, CREDIT, stream->id, 2 * OFFSET);
        put64(sent->head + HEADER, stream->granted);
        put64(sent->head + HEADER + OFFSET, stream->consumed);
        memcpy(at, sent->head, CREDIT_FRAME);
        at += CREDIT_FRAME;
    }
    Pieces frames = {.count = 0};
    append(&frames, NULL, (char *)lease->credits, at - lease->credits);
    return frames.count ? say(lease, &frames) : 0;
}

/* Do not look at a socket for which there is no credit. */
static void hold(Lease *lease, Stream *stream)
{
    stream->held = 1;
    watch(lease, stream->fd, stream->others);
}

void release(Lease *lease, Stream *stream)
{
    stream->held = 0;
    watch(lease, stream->fd, EPOLLIN | stream->others);
}

/* A local socket has something.  -1 with an exception. */
int from_local(Lease *lease, Stream *stream)
{
    if (lease->blocked || stream->sent == stream->limit) {
        hold(lease, stream);
        return 0;
    }
    int64_t most = lease->local_turn;
    if (lease->room - HEADER - lease->frame_cost < most)
        most = lease->room - HEADER - lease->frame_cost;
    if (most <= 0 || lease->sent_count == MOST_SENT) {
        lease->over = 1;
        return 0;
    }
    if ((uint64_t)most > stream->limit - stream->sent)
        most = stream->limit - stream->sent;
    Pieces pieces = {.count = 0};
    Output output = {.pool = lease->pool, .pieces = &pieces};
    int failed = gather(&output, stream->fd, most, READ_ROOM, READ_AGAIN, &stream->read_end) < 0;
    if (failed || stream->read_end)
        lease->over = 1;
    if (!pieces.count)
        return failed ? -1 : 0;
    Sent *sent = keep(lease, HEADER + pieces.length);
    sent->head_length = HEADER;
    put_header(sent->head, DATA, stream->id, pieces.length);
    sent->payload = pieces;
    stream->sent += pieces.length;
    lease->carried += pieces.length;
    Pieces frames = {.count = 0};
    if (lease->rx_next - lease->rx_acknowledged >= lease->ack_bytes / ACK_RIDE_SHARE)
        append(&frames, NULL, (char *)lease->ack, put_ack(lease, lease->ack));
    append(&frames, NULL, (char *)sent->head, HEADER);
    for (int i = 0; i < pieces.count; i++)
        append(&frames, pieces.piece[i].owner, pieces.piece[i].memory, pieces.piece[i].length);
    Error error = keep_error();
    return raise_again(error, say(lease, &frames));
}

static Stream *stream_of(Lease *lease, uint32_t id)
{
    for (int i = 0; i < lease->stream_count; i++)
        if (lease->streams[i].id == id)
            return &lease->streams[i];
    return NULL;
}

/* Whether the frame whose header has arrived is one of those that are for us. */
static int begin_frame(Lease *lease)
{
    const unsigned char *header = lease->header;
    uint32_t id = get32(header + 4), length = get32(header + 8);
    if (header[1] || header[2] || header[3])
        return 0;
    lease->kind = header[0];
    lease->missing = length;
    if (lease->kind == ACK)
        return !id && length == OFFSET;
    Stream *stream = lease->stream = stream_of(lease, id);
    if (!stream)
        return 0;
    if (lease->kind == CREDIT)
        return stream->reads && length == 2 * OFFSET;
    return lease->kind == DATA && stream->writes && length && length <= lease->max_payload &&
           length <= stream->granted - stream->received;
}

/* The payload of an ACK or CREDIT, which may be in pieces. */
static void copy_payload(const Lease *lease, unsigned char *to)
{
    for (int i = 0; i < lease->payload.count; i++) {
        memcpy(to, lease->payload.piece[i].memory, lease->payload.piece[i].length);
        to += lease->payload.piece[i].length;
    }
}

static int take_credit(Lease *lease, const unsigned char *payload)
{
    Stream *stream = lease->stream;
    uint64_t limit = get64(payload), delivered = get64(payload + OFFSET);
    if (limit < stream->limit || limit > MAX_OFFSET || delivered < stream->delivered ||
        delivered > stream->sent)
        return -1;
    stream->limit = limit;
    stream->delivered = delivered;
    return 0;
}

/* Have the stream's socket take what has arrived for it. */
static void deliver(Lease *lease, Stream *stream)
{
    if (!stream->untaken.count)
        return;
    stream->consumed += put(stream->fd, &stream->untaken, &stream->write_end);
    if (stream->untaken.count) {
        stream->writes = 0;
        lease->over = 1;
    }
    stream->credit_due = stream->consumed + stream->size >= stream->granted + stream->step;
}

/*
 * Payload for a stream, which its socket takes at the end of the turn: each call wakes who reads there.
 * -1: it takes nothing more.
 */
static int take_data(Lease *lease, Stream *stream)
{
    if (stream->untaken.count + lease->payload.count > MOST_PIECES) {
        deliver(lease, stream);
        if (stream->untaken.count)
            return -1;
    }
    stream->received += lease->payload.length;
    lease->rx_next += HEADER + lease->payload.length;
    lease->carried += lease->payload.length;
    for (int i = 0; i < lease->payload.count; i++) {
        const Piece *piece = &lease->payload.piece[i];
        append(&stream->untaken, piece->owner, piece->memory, piece->length);
    }
    drop(&lease->payload);
    return 0;
}

/* The frame is complete.  -1: it is Python's after all. */
static int end_frame(Lease *lease)
{
    unsigned char payload[2 * OFFSET] = {0};
    if (lease->kind == DATA)
        return take_data(lease, lease->stream);
    copy_payload(lease, payload);
    if (lease->kind == ACK ? acknowledge(lease, get64(payload)) : take_credit(lease, payload))
        return -1;
    if (lease->kind == CREDIT)
        lease->rx_next += CREDIT_FRAME;
    drop(&lease->payload);
    return 0;
}

/* Leave the frame that is arriving to Python.  -1 with an exception. */
int give_up_frame(Lease *lease)
{
    lease->over = 1;
    if (!lease->left && !(lease->left = PyList_New(0)))
        return -1;
    if (!lease->header_length)
        return 0;
    PyObject *header = PyBytes_FromStringAndSize((char *)lease->header, lease->header_length);
    int failed = !header || PyList_Append(lease->left, header) ||
                 append_buffers(lease->left, &lease->payload);
    Py_XDECREF(header);
    lease->header_length = 0;
    drop(&lease->payload);
    return failed ? -1 : 0;
}

/* Take in what was received.  -1 with an exception. */
int take_in(Lease *lease, const Piece *piece)
{
    char *at = piece->memory;
    Py_ssize_t length = piece->length;
    while (length && !lease->left) {
        Py_ssize_t count;
        if (lease->header_length < HEADER) {
            count = HEADER - lease->header_length < length ? HEADER - lease->header_length : length;
            memcpy(lease->header + lease->header_length, at, count);
            lease->header_length += count;
            at += count;
            length -= count;
            if (lease->header_length == HEADER && !begin_frame(lease) && give_up_frame(lease))
                return -1;
            continue;
        }
        count = lease->missing < length ? lease->missing : length;
        if (append(&lease->payload, piece->owner, at, count)) {
            if (give_up_frame(lease))
                return -1;
            break;
        }
        at += count;
        length -= count;
        lease->missing -= count;
        if (lease->missing)
            continue;
        if (end_frame(lease)) {
            if (give_up_frame(lease))
                return -1;
        } else {
            lease->header_length = 0;
        }
    }
    if (!length)
        return 0;
    Piece rest = {piece->owner, at, length};
    PyObject *buffer = as_buffer(&rest);
    int failed = !buffer || PyList_Append(lease->left, buffer);
    Py_XDECREF(buffer);
    return failed ? -1 : 0;
}

void deliver_all(Lease *lease)
{
    for (int i = 0; i < lease->stream_count; i++)
        deliver(lease, &lease->streams[i]);
}

/* Say what is due, and have those watched again who may send.  -1 with an exception. */
static int go_on(Lease *lease)
{
    if (answer(lease))
        return -1;
    for (int i = 0; i < lease->stream_count && !lease->blocked; i++)
        if (lease->streams[i].held && lease->streams[i].sent < lease->streams[i].limit)
            release(lease, &lease->streams[i]);
    return 0;
}

/* Leave what was received to Python, as it is.  -1 with an exception. */
static int leave_encrypted(Lease *lease, const Piece *piece)
{
    if (!piece->length)
        return 0;
    PyObject *buffer = as_buffer(piece);
    int failed = !buffer || PyList_Append(lease->unread, buffer);
    Py_XDECREF(buffer);
    return failed ? -1 : 0;
}

/* Take in what was received encrypted, up to a record that is not data.  -1 with an exception. */
static int decrypt(Lease *lease, const Piece *piece)
{
    if (lease->unread)
        return leave_encrypted(lease, piece);
    Pieces plain = {.count = 0};
    Output output = {.pool = lease->pool, .pieces = &plain};
    Py_ssize_t used;
    int failed = open_records(lease->opener, lease->wrong_tag, piece->memory, piece->length, &used, &output,
                              &lease->odd);
    for (int i = 0; i < plain.count && !failed; i++)
        failed = take_in(lease, &plain.piece[i]);
    drop(&plain);
    if (failed)
        return -1;
    if (!lease->odd.alert && !lease->odd.type)
        return 0;
    lease->over = 1;
    if (!(lease->unread = PyList_New(0)))
        return -1;
    Piece rest = {piece->owner, piece->memory + used, piece->length - used};
    return leave_encrypted(lease, &rest);
}

/* The link has something.  -1 with an exception. */
int from_link(Lease *lease)
{
    Pieces pieces = {.count = 0};
    Output output = {.pool = lease->opener ? lease->ciphers : lease->pool, .pieces = &pieces};
    int failed = gather(&output, lease->fd, lease->link_turn, READ_ROOM, READ_AGAIN, &lease->read_end) < 0;
    Error error = keep_error();
    int lost = 0;
    for (int i = 0; i < pieces.count && !lost; i++) /* what was read before it failed, too */
        lost = lease->opener ? decrypt(lease, &pieces.piece[i]) : take_in(lease, &pieces.piece[i]);
    drop(&pieces);
    deliver_all(lease);
    if (lost)
        lease->read_end = EIO; /* the connection cannot go on without what is lost: the next one repeats it */
    if (failed || lost || lease->read_end)
        lease->over = 1;
    if (raise_again(error, lost))
        return -1;
    return go_on(lease);
}

/* The link takes something again.  -1 with an exception. */
int link_takes(Lease *lease)
{
    push(lease);
    return go_on(lease);
}
