/*
 * The fast path: bulk between local sockets and a link, without Python for each turn.
 *
 * Python touches a quarter of a megabyte of memory in a turn, which takes the place of the
 * kernel's in the processor's caches.  So while nothing but bulk moves, what it would do in
 * a turn is done here: DATA frames out of local sockets and into them, ACK and CREDIT for
 * them.  Whatever else there is ends that, and Python finds everything as if it had done it
 * itself.  docs/decisions/0029-a-fast-path-for-bulk.md has the whole story.
 *
 * A Lease is a link and its streams for the time in which Python leaves them alone.
 * relaymux/net/fastpath.py makes it, when nothing else waits to be said or done, and
 * settles it: takes the counters, and what is not sent, delivered or understood.
 */

#include "_native.h"

#include <endian.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Frames (docs/protocol.md, 3). */
#define HEADER 12
#define OFFSET 8
#define ACK_FRAME (HEADER + OFFSET)
#define CREDIT_FRAME (HEADER + 2 * OFFSET)
enum { ACK = 0x06, DATA = 0x13, CREDIT = 0x14 };

#define MAX_OFFSET INT64_MAX

/* Bytes of it in relaymux/net/receiving.py. */
#define READ_ROOM (64 * 1024)
#define READ_AGAIN (16 * 1024)

/* Pieces of pooled memory that a frame may be in; with more of them it is Python's. */
#define MOST_PIECES 12

/* Frames that are not acknowledged, and streams.  With more of them it is Python's turn. */
#define MOST_SENT 64
#define MOST_STREAMS 64

#define MOST_EVENTS 64

/* Bytes in memory that `owner` keeps. */
typedef struct {
    PyObject *owner; /* a Lent, or a memoryview; NULL for memory of the lease's own */
    char *memory;
    Py_ssize_t length;
} Piece;

typedef struct {
    Piece piece[MOST_PIECES];
    int count;
    Py_ssize_t length;
} Pieces;

/* A sequenced frame that was sent and not acknowledged. */
typedef struct {
    uint64_t end; /* in the numbering of sequenced bytes */
    int head_length;
    unsigned char head[CREDIT_FRAME];
    Pieces payload;
} Sent;

typedef struct {
    uint32_t id;
    int fd;
    int reads, writes; /* whether its socket is read, and written, here */
    uint32_t others;   /* what else Python's reactor waits for there */
    int held;          /* not watched, as there is no credit */
    /* What its socket gave: docs/protocol.md, 4.3 and 5. */
    uint64_t sent, limit, delivered, sent_before;
    /* What its socket took, and the credit for it. */
    uint64_t received, consumed, granted, size, received_before, consumed_before;
    int credit_due;
    /* How its socket has ended for reading (-1 or an error), and for writing (an error). */
    int read_end, write_end;
    Pieces untaken; /* payload that its socket is to take, or does not */
} Stream;

typedef struct {
    PyObject_HEAD
    Pool *pool;
    int fd, epoll;
    int over;    /* it is Python's turn */
    int settled; /* Python has taken it back */
    /* What is sent. */
    uint64_t end, acknowledged, settled_end;
    int64_t room; /* of the replay buffer; negative with control frames beyond it */
    uint64_t most_held; /* bytes in it with which control frames have to wait, too */
    uint64_t *ends; /* of the frames that were sent before, oldest first; those from `first_end` on are not acknowledged */
    Py_ssize_t first_end, end_count;
    Py_ssize_t frame_cost, turn;
    Sent *sent; /* a ring of MOST_SENT */
    int first, sent_count;
    int blocked; /* the link takes nothing more; `unsent` is what is left of a write */
    Pieces unsent;
    unsigned char ack[ACK_FRAME]; /* what `unsent` may have of an ACK; and of CREDITs: */
    unsigned char credits[CREDIT_FRAME * MOST_STREAMS + ACK_FRAME];
    int write_end;
    /* What is received. */
    uint64_t rx_next, rx_acknowledged, ack_bytes;
    uint32_t max_payload;
    unsigned char header[HEADER];
    int header_length, kind;
    Stream *stream; /* of the DATA or CREDIT frame that is arriving */
    Py_ssize_t missing;
    Pieces payload;
    PyObject *left; /* a list: what is not understood, and all behind it */
    int read_end;
    uint64_t carried;
    int stream_count, places;
    Stream *streams;
} Lease;

static PyTypeObject LeaseType;

/* ---- Pieces ------------------------------------------------------------------------ */

static void drop(Pieces *pieces)
{
    for (int i = 0; i < pieces->count; i++)
        Py_XDECREF(pieces->piece[i].owner);
    pieces->count = 0;
    pieces->length = 0;
}

/* Append; one that lies behind the last one makes that longer.  -1 without an exception: there are too many. */
static int append(Pieces *pieces, PyObject *owner, char *memory, Py_ssize_t length)
{
    if (!length)
        return 0;
    Piece *last = pieces->count ? &pieces->piece[pieces->count - 1] : NULL;
    if (last && owner && last->owner == owner && last->memory + last->length == memory) {
        last->length += length;
    } else if (pieces->count == MOST_PIECES) {
        return -1;
    } else {
        pieces->piece[pieces->count++] = (Piece){Py_XNewRef(owner), memory, length};
    }
    pieces->length += length;
    return 0;
}

/* Without the first `count` bytes. */
static void shorten(Pieces *pieces, Py_ssize_t count)
{
    int gone = 0;
    pieces->length -= count;
    while (gone < pieces->count && count >= pieces->piece[gone].length)
        count -= pieces->piece[gone++].length;
    for (int i = 0; i < gone; i++)
        Py_XDECREF(pieces->piece[i].owner);
    pieces->count -= gone;
    memmove(pieces->piece, pieces->piece + gone, pieces->count * sizeof(Piece));
    if (count) {
        pieces->piece[0].memory += count;
        pieces->piece[0].length -= count;
    }
}

/* As what Python passes on. */
static PyObject *as_buffer(const Piece *piece)
{
    if (!piece->owner)
        return PyBytes_FromStringAndSize(piece->memory, piece->length);
    if (Py_IS_TYPE(piece->owner, &LentType)) {
        Lent *lent = (Lent *)piece->owner;
        return view_of(lent, piece->memory - lent->memory, piece->length, 1);
    }
    Py_buffer *whole = PyMemoryView_GET_BUFFER(piece->owner);
    Py_ssize_t start = piece->memory - (char *)whole->buf;
    return PySequence_GetSlice(piece->owner, start, start + piece->length);
}

static int append_buffers(PyObject *list, const Pieces *pieces)
{
    for (int i = 0; i < pieces->count; i++) {
        PyObject *buffer = as_buffer(&pieces->piece[i]);
        if (!buffer || PyList_Append(list, buffer)) {
            Py_XDECREF(buffer);
            return -1;
        }
        Py_DECREF(buffer);
    }
    return 0;
}

static PyObject *as_list(const Pieces *pieces)
{
    PyObject *list = PyList_New(0);
    if (list && append_buffers(list, pieces))
        Py_CLEAR(list);
    return list;
}

/* ---- Sockets ----------------------------------------------------------------------- */

/*
 * Read up to `limit` bytes in up to `most` pieces, as pool_gather does.  Sets `ended` to -1 at the end of input, to an
 * error where there is one, else to 0.  -1 with an exception.
 */
static int gather(Pool *pool, int fd, Py_ssize_t limit, Pieces *pieces, int most, int *ended)
{
    *ended = 0;
    while (limit > 0 && pieces->count < most) {
        Py_ssize_t space;
        char *room = room_in(pool, READ_ROOM, &space);
        if (!room)
            return -1;
        if (space > limit)
            space = limit;
        ssize_t count = recv(fd, room, space, MSG_DONTWAIT);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0) {
            if (!count)
                *ended = -1;
            else if (errno != EAGAIN && errno != EWOULDBLOCK)
                *ended = errno;
            break;
        }
        append(pieces, (PyObject *)pool->current, room, count); /* there is place for one */
        pool->filled += count;
        limit -= count;
        if (count < READ_AGAIN && count < space)
            break;
    }
    return 0;
}

/*
 * Write, and leave in `pieces` what the socket did not take.  Returns the bytes that it took, and sets
 * `error` where it never will.
 */
static Py_ssize_t put(int fd, Pieces *pieces, int *error)
{
    struct iovec parts[MOST_PIECES];
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = pieces->count};
    for (int i = 0; i < pieces->count; i++)
        parts[i] = (struct iovec){pieces->piece[i].memory, pieces->piece[i].length};
    ssize_t count;
    do
        count = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (count < 0 && errno == EINTR);
    if (count < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            *error = errno;
        return 0;
    }
    if (count == pieces->length)
        drop(pieces);
    else
        shorten(pieces, count);
    return count;
}

static void watch(const Lease *lease, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(lease->epoll, EPOLL_CTL_MOD, fd, &event);
}

/* ---- Numbers on the wire ------------------------------------------------------------ */

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

/* ---- To the link -------------------------------------------------------------------- */

/* A place for one more frame that is kept until it is acknowledged; the caller has looked whether there is one. */
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
    }
    if (offset > lease->settled_end) {
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

/* An ACK, at `at`.  Returns its length. */
static int put_ack(Lease *lease, unsigned char *at)
{
    put_header(at, ACK, 0, OFFSET);
    put64(at + HEADER, lease->rx_next);
    lease->rx_acknowledged = lease->rx_next;
    return ACK_FRAME;
}

/* Say what is due: CREDIT, and ACK, which rides along where that is worthwhile.  See Link.data_to_send. */
static void answer(Lease *lease)
{
    if (lease->blocked)
        return;
    unsigned char *at = lease->credits;
    int due = 0;
    for (int i = 0; i < lease->stream_count; i++)
        due += lease->streams[i].credit_due;
    uint64_t new_bytes = lease->rx_next - lease->rx_acknowledged;
    if (new_bytes >= (due ? lease->ack_bytes / 4 : lease->ack_bytes))
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
    if (at > lease->credits) {
        append(&lease->unsent, NULL, (char *)lease->credits, at - lease->credits);
        push(lease);
    }
}

/* Do not look at a socket for which there is no credit. */
static void hold(Lease *lease, Stream *stream)
{
    stream->held = 1;
    watch(lease, stream->fd, stream->others);
}

static void release(Lease *lease, Stream *stream)
{
    stream->held = 0;
    watch(lease, stream->fd, EPOLLIN | stream->others);
}

/* A local socket has something.  -1 with an exception. */
static int from_local(Lease *lease, Stream *stream)
{
    if (lease->blocked || stream->sent == stream->limit) {
        hold(lease, stream);
        return 0;
    }
    int64_t most = lease->turn;
    if (lease->room - HEADER - lease->frame_cost < most)
        most = lease->room - HEADER - lease->frame_cost;
    if (most <= 0 || lease->sent_count == MOST_SENT) {
        lease->over = 1;
        return 0;
    }
    if ((uint64_t)most > stream->limit - stream->sent)
        most = stream->limit - stream->sent;
    Pieces pieces = {.count = 0};
    /* An ACK and a header go in front. */
    int failed = gather(lease->pool, stream->fd, most, &pieces, MOST_PIECES - 2, &stream->read_end);
    if (failed || stream->read_end)
        lease->over = 1;
    if (pieces.count) {
        Sent *sent = keep(lease, HEADER + pieces.length);
        sent->head_length = HEADER;
        put_header(sent->head, DATA, stream->id, pieces.length);
        sent->payload = pieces;
        stream->sent += pieces.length;
        lease->carried += pieces.length;
        if (lease->rx_next - lease->rx_acknowledged >= lease->ack_bytes / 4)
            append(&lease->unsent, NULL, (char *)lease->ack, put_ack(lease, lease->ack));
        append(&lease->unsent, NULL, (char *)sent->head, HEADER);
        for (int i = 0; i < pieces.count; i++)
            append(&lease->unsent, pieces.piece[i].owner, pieces.piece[i].memory, pieces.piece[i].length);
        push(lease);
    }
    return failed;
}

/* ---- From the link ------------------------------------------------------------------ */

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
    if (limit < stream->limit || limit > MAX_OFFSET || delivered < stream->delivered || delivered > stream->sent)
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
    /* As ReceiveWindow.consume has it. */
    stream->credit_due = stream->consumed + stream->size >= stream->granted + stream->size / 4;
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
static int give_up_frame(Lease *lease)
{
    lease->over = 1;
    if (!lease->left && !(lease->left = PyList_New(0)))
        return -1;
    if (!lease->header_length)
        return 0;
    PyObject *header = PyBytes_FromStringAndSize((char *)lease->header, lease->header_length);
    int failed = !header || PyList_Append(lease->left, header) || append_buffers(lease->left, &lease->payload);
    Py_XDECREF(header);
    lease->header_length = 0;
    drop(&lease->payload);
    return failed ? -1 : 0;
}

/* Take in what was received.  -1 with an exception. */
static int take_in(Lease *lease, const Piece *piece)
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

static void deliver_all(Lease *lease)
{
    for (int i = 0; i < lease->stream_count; i++)
        deliver(lease, &lease->streams[i]);
}

/* The link has something.  -1 with an exception. */
static int from_link(Lease *lease)
{
    Pieces pieces = {.count = 0};
    int failed = gather(lease->pool, lease->fd, lease->turn, &pieces, MOST_PIECES, &lease->read_end), lost = 0;
    for (int i = 0; i < pieces.count && !lost; i++) /* what was read before it failed, too */
        lost = take_in(lease, &pieces.piece[i]);
    drop(&pieces);
    deliver_all(lease);
    if (lost) {
        failed = lost;
        lease->read_end = EIO; /* the connection cannot go on without what is lost: the next one repeats it */
    }
    if (failed || lease->read_end)
        lease->over = 1;
    if (!failed) {
        answer(lease);
        for (int i = 0; i < lease->stream_count && !lease->blocked; i++)
            if (lease->streams[i].held && lease->streams[i].sent < lease->streams[i].limit)
                release(lease, &lease->streams[i]);
    }
    return failed;
}

/* The link takes something again. */
static void link_takes(Lease *lease)
{
    push(lease);
    answer(lease);
    for (int i = 0; i < lease->stream_count && !lease->blocked; i++)
        if (lease->streams[i].held && lease->streams[i].sent < lease->streams[i].limit)
            release(lease, &lease->streams[i]);
}

/* ---- The type ----------------------------------------------------------------------- */

static void lease_dealloc(Lease *lease)
{
    for (int i = 0; i < lease->sent_count; i++)
        drop(&lease->sent[(lease->first + i) % MOST_SENT].payload);
    for (int i = 0; i < lease->stream_count; i++)
        drop(&lease->streams[i].untaken);
    drop(&lease->unsent);
    drop(&lease->payload);
    Py_XDECREF(lease->left);
    Py_XDECREF(lease->pool);
    PyMem_Free(lease->sent);
    PyMem_Free(lease->ends);
    PyMem_Free(lease->streams);
    Py_TYPE(lease)->tp_free(lease);
}

static PyObject *lease_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *pool, *ends;
    int fd, epoll, places;
    unsigned long long end, acknowledged, most_held, rx_next, rx_acknowledged, ack_bytes;
    long long room;
    Py_ssize_t frame_cost, turn;
    unsigned int max_payload;
    if (!PyArg_ParseTuple(args, "O!ii(KKLKnO!)(KKKI)ni", &PoolType, &pool, &fd, &epoll, &end, &acknowledged,
                          &room, &most_held, &frame_cost, &PyList_Type, &ends, &rx_next, &rx_acknowledged, &ack_bytes, &max_payload, &turn, &places))
        return NULL;
    if (check_minimum((Pool *)pool, READ_ROOM))
        return NULL;
    Lease *lease = (Lease *)type->tp_alloc(type, 0);
    if (!lease)
        return NULL;
    lease->pool = (Pool *)Py_NewRef(pool);
    lease->fd = fd;
    lease->epoll = epoll;
    lease->end = lease->settled_end = end;
    lease->acknowledged = acknowledged;
    lease->room = room;
    lease->most_held = most_held;
    lease->frame_cost = frame_cost;
    lease->turn = turn;
    lease->rx_next = rx_next;
    lease->rx_acknowledged = rx_acknowledged;
    lease->ack_bytes = ack_bytes;
    lease->max_payload = max_payload;
    lease->places = places < 0 ? 0 : places > MOST_STREAMS ? MOST_STREAMS : places;
    lease->sent = PyMem_Malloc(MOST_SENT * sizeof(Sent));
    lease->streams = PyMem_Malloc((lease->places + 1) * sizeof(Stream));
    lease->ends = PyMem_Malloc((PyList_GET_SIZE(ends) + 1) * sizeof(uint64_t));
    if (!lease->sent || !lease->streams || !lease->ends) {
        Py_DECREF(lease);
        return PyErr_NoMemory();
    }
    for (; lease->end_count < PyList_GET_SIZE(ends); lease->end_count++)
        lease->ends[lease->end_count] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(ends, lease->end_count));
    if (PyErr_Occurred()) {
        Py_DECREF(lease);
        return NULL;
    }
    return (PyObject *)lease;
}

static PyObject *lease_add(Lease *lease, PyObject *args)
{
    unsigned int id;
    int fd, reads, writes, queued;
    unsigned long long sent, limit, delivered, received, consumed, granted, size;
    if (!PyArg_ParseTuple(args, "Iippp(KKK)(KKKK):add", &id, &fd, &reads, &writes, &queued, &sent, &limit, &delivered,
                          &received, &consumed, &granted, &size))
        return NULL;
    if (lease->stream_count == lease->places)
        Py_RETURN_FALSE;
    lease->streams[lease->stream_count++] = (Stream){
        .id = id,
        .fd = fd,
        .reads = reads,
        .writes = writes,
        .others = queued ? EPOLLOUT : 0,
        .sent = sent,
        .sent_before = sent,
        .limit = limit,
        .delivered = delivered,
        .received = received,
        .received_before = received,
        .consumed = consumed,
        .consumed_before = consumed,
        .granted = granted,
        .size = size,
    };
    Py_RETURN_TRUE;
}

static PyObject *lease_owe(Lease *lease, PyObject *buffers)
{
    PyObject *list = PySequence_Fast(buffers, "owe() takes a sequence");
    if (!list)
        return NULL;
    int failed = lease->blocked || PySequence_Fast_GET_SIZE(list) > MOST_PIECES - 1, error = 0;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list) && !failed && !error; i++) {
        PyObject *view = PyMemoryView_FromObject(PySequence_Fast_GET_ITEM(list, i));
        if (!view) {
            error = 1;
            break;
        }
        Py_buffer *whole = PyMemoryView_GET_BUFFER(view);
        failed = append(&lease->unsent, view, whole->buf, whole->len);
        Py_DECREF(view);
    }
    Py_DECREF(list);
    if (error)
        return NULL;
    if (failed) {
        drop(&lease->unsent);
        Py_RETURN_FALSE;
    }
    if (lease->unsent.count) {
        lease->blocked = 1;
        watch(lease, lease->fd, EPOLLIN | EPOLLOUT);
    }
    Py_RETURN_TRUE;
}

static PyObject *lease_feed(Lease *lease, PyObject *buffers)
{
    PyObject *list = PySequence_Fast(buffers, "feed() takes a sequence");
    if (!list) {
        lease->read_end = EIO;
        return NULL;
    }
    int failed = 0;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list) && !failed; i++) {
        PyObject *view = PyMemoryView_FromObject(PySequence_Fast_GET_ITEM(list, i));
        if (!view) {
            failed = -1;
            break;
        }
        Py_buffer *whole = PyMemoryView_GET_BUFFER(view);
        Piece piece = {view, whole->buf, whole->len};
        if (lease->left)
            failed = PyList_Append(lease->left, view);
        else
            failed = take_in(lease, &piece);
        Py_DECREF(view);
    }
    Py_DECREF(list);
    deliver_all(lease);
    if (failed) {
        lease->over = 1;
        lease->read_end = EIO; /* as in from_link() */
        return NULL;
    }
    return PyBool_FromLong(!lease->over);
}

/* One stream's part of what settle() returns. */
static PyObject *stream_result(const Stream *stream)
{
    PyObject *untaken = as_list(&stream->untaken);
    if (!untaken)
        return NULL;
    return Py_BuildValue("(IKKKKKKNii)", stream->id, (unsigned long long)(stream->sent - stream->sent_before),
                         (unsigned long long)stream->limit, (unsigned long long)stream->delivered,
                         (unsigned long long)(stream->received - stream->received_before),
                         (unsigned long long)(stream->consumed - stream->consumed_before),
                         (unsigned long long)stream->granted, untaken, stream->read_end, stream->write_end);
}

static PyObject *sent_result(const Sent *sent)
{
    PyObject *buffers = PyList_New(0);
    if (!buffers)
        return NULL;
    PyObject *head = PyBytes_FromStringAndSize((char *)sent->head, sent->head_length);
    if (!head || PyList_Append(buffers, head) || append_buffers(buffers, &sent->payload)) {
        Py_XDECREF(head);
        Py_DECREF(buffers);
        return NULL;
    }
    Py_DECREF(head);
    return Py_BuildValue("(KN)", (unsigned long long)sent->end, buffers);
}

static PyObject *lease_settle(Lease *lease, PyObject *unused)
{
    if (lease->settled) {
        PyErr_SetString(PyExc_RuntimeError, "settled before");
        return NULL;
    }
    PyObject *sent = PyList_New(0), *streams = PyList_New(0), *unsent = NULL;
    if (!sent || !streams || give_up_frame(lease))
        goto fail;
    for (int i = 0; i < lease->sent_count; i++) {
        PyObject *frame = sent_result(&lease->sent[(lease->first + i) % MOST_SENT]);
        if (!frame || PyList_Append(sent, frame)) {
            Py_XDECREF(frame);
            goto fail;
        }
        Py_DECREF(frame);
    }
    for (int i = 0; i < lease->stream_count; i++) {
        PyObject *stream = stream_result(&lease->streams[i]);
        if (!stream || PyList_Append(streams, stream)) {
            Py_XDECREF(stream);
            goto fail;
        }
        Py_DECREF(stream);
    }
    if (!(unsent = as_list(&lease->unsent)))
        goto fail;
    lease->settled = 1;
    return Py_BuildValue("(KKKKNNOiNiK)", (unsigned long long)lease->end, (unsigned long long)lease->acknowledged,
                         (unsigned long long)lease->rx_next, (unsigned long long)lease->rx_acknowledged, sent,
                         unsent, lease->left, lease->read_end, streams, lease->write_end,
                         (unsigned long long)lease->carried);
fail:
    Py_XDECREF(sent);
    Py_XDECREF(streams);
    Py_XDECREF(unsent);
    return NULL;
}

static PyMethodDef lease_methods[] = {
    {"add", (PyCFunction)lease_add, METH_VARARGS, NULL},
    {"owe", (PyCFunction)lease_owe, METH_O, NULL},
    {"feed", (PyCFunction)lease_feed, METH_O, NULL},
    {"settle", (PyCFunction)lease_settle, METH_NOARGS, NULL},
    {NULL},
};

static PyTypeObject LeaseType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Lease",
    .tp_basicsize = sizeof(Lease),
    .tp_new = lease_new,
    .tp_dealloc = (destructor)lease_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = lease_methods,
};

/* ---- Waiting ------------------------------------------------------------------------ */

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Have one of the leases take care of an event.  Returns whether one did; -1 with an exception. */
static int carry(PyObject *leases, const struct epoll_event *event)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        if (lease->over)
            continue;
        if (event->data.fd == lease->fd) {
            /* Python may have asked whether it takes something, too. */
            if (event->events & ~(lease->blocked ? EPOLLIN | EPOLLOUT : EPOLLIN))
                return 0;
            if (event->events & EPOLLOUT)
                link_takes(lease);
            return event->events & EPOLLIN && !lease->over && from_link(lease) ? -1 : 1;
        }
        for (int j = 0; j < lease->stream_count; j++) {
            Stream *stream = &lease->streams[j];
            if (event->data.fd != stream->fd)
                continue;
            if (!stream->reads || event->events != EPOLLIN)
                return 0;
            return from_local(lease, stream) ? -1 : 1;
        }
    }
    return 0;
}

static int any_over(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (((Lease *)PyList_GET_ITEM(leases, i))->over)
            return 1;
    return 0;
}

/* Have epoll watch what Python's reactor believes that it watches. */
static void restore(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        lease->over = 1;
        if (lease->blocked)
            watch(lease, lease->fd, EPOLLIN);
        for (int j = 0; j < lease->stream_count; j++)
            if (lease->streams[j].held)
                release(lease, &lease->streams[j]);
    }
}

static int use_pools(PyObject *leases, int use)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        ((Lease *)PyList_GET_ITEM(leases, i))->pool->in_use = use;
    return 0;
}

static PyObject *fast_wait(PyObject *module, PyObject *args)
{
    int epoll;
    double timeout, longest;
    PyObject *leases;
    if (!PyArg_ParseTuple(args, "iddO!:wait", &epoll, &timeout, &longest, &PyList_Type, &leases))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (!Py_IS_TYPE(PyList_GET_ITEM(leases, i), &LeaseType)) {
            PyErr_SetString(PyExc_TypeError, "wait() takes a list of leases");
            return NULL;
        }
    PyObject *others = PyList_New(0);
    if (!others)
        return NULL;
    double until = seconds() + (timeout >= 0 && timeout < longest ? timeout : longest);
    int failed = 0;
    for (int looks = 0; !failed && !PyList_GET_SIZE(others) && !any_over(leases); looks = 1) {
        struct epoll_event events[MOST_EVENTS];
        double left = until - seconds();
        if (left < 0 && looks)
            break; /* not before there was one look: with no time at all there may be events */
        int count;
        Py_BEGIN_ALLOW_THREADS
        count = epoll_wait(epoll, events, MOST_EVENTS, left > 0 ? (int)ceil(left * 1000) : 0);
        Py_END_ALLOW_THREADS
        if (count < 0) {
            if (errno != EINTR)
                PyErr_SetFromErrno(PyExc_OSError);
            failed = errno != EINTR || PyErr_CheckSignals();
            break;
        }
        if (!count)
            break;
        use_pools(leases, 1);
        for (int i = 0; i < count && !failed; i++) {
            int done = carry(leases, &events[i]);
            if (!done) {
                PyObject *event = Py_BuildValue("(iI)", events[i].data.fd, events[i].events);
                done = event ? PyList_Append(others, event) : -1;
                Py_XDECREF(event);
            }
            failed = done < 0;
        }
        use_pools(leases, 0);
    }
    restore(leases);
    if (failed)
        Py_CLEAR(others);
    return others;
}

static PyMethodDef functions[] = {
    {"wait", fast_wait, METH_VARARGS, NULL},
    {NULL},
};

int add_fastpath(PyObject *module)
{
    if (PyType_Ready(&LeaseType) || PyModule_AddFunctions(module, functions))
        return -1;
    return PyModule_AddObjectRef(module, "Lease", (PyObject *)&LeaseType);
}
