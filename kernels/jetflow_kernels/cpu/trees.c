/* From candidate tables to trees, and calibrated scores: integers only, so that they are those of the Python that is
 * beside it bit for bit.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 128
/* As in jetflow_cluster.tree.build. */
#define VALUE_UNIT ((int64_t)1 << 24)
#define VALUE_SHIFT 8
#define LOOK_EVERY 16

/* One request, as the caller lists them: all of 64 bits. */
typedef struct {
    const int64_t *ids;    /* [num_depths, width] */
    const int32_t *scores; /* [num_depths, num_parents, width]; NULL is a bare root */
    int64_t num_depths, num_parents, width;
    int64_t num_left;  /* most nodes beside the root */
    int64_t max_depth;
    int64_t bias;
} Table;

/* A node that may be taken next; the node's siblings are a row of the table's scores. */
typedef struct {
    int64_t negated;      /* cumulative score with the request's bias, negated */
    int64_t parent_score; /* the parent's, not negated */
    int32_t depth, request, rank, place, parent, row;
} Entry;

typedef struct {
    const Table *table;
    int16_t *order;   /* [num_depths * num_parents, width]: ranks, best first */
    uint8_t *ordered; /* [num_depths * num_parents] */
    int16_t *ranks;   /* of each node */
    int64_t *token_ids, *parents, *depths, *scores;
    int64_t num_nodes, num_left;
} Tree;

typedef struct {
    const int64_t *costs, *values;
    int64_t num_costs, last_value;
    int32_t *taken;
    int64_t num_taken, value, best_value, best_cost, num_best;
} Price;

/* Candidate ranks from the root to an entry. */
static void path_of(const Tree *trees, const Entry *entry, int16_t *path) {
    const Tree *tree = &trees[entry->request];
    path[entry->depth - 1] = (int16_t)entry->rank;
    int64_t node = entry->parent;
    for (int32_t depth = entry->depth - 1; depth > 0; depth--) {
        path[depth - 1] = tree->ranks[node];
        node = tree->parents[node];
    }
}

/* By score, then depth, then the path of ranks, then the request. */
static int comes_before(const Tree *trees, const Entry *a, const Entry *b) {
    if (a->negated != b->negated) return a->negated < b->negated;
    if (a->depth != b->depth) return a->depth < b->depth;
    int16_t path_a[MAX_DEPTH], path_b[MAX_DEPTH];
    path_of(trees, a, path_a);
    path_of(trees, b, path_b);
    for (int32_t i = 0; i < a->depth; i++)
        if (path_a[i] != path_b[i]) return path_a[i] < path_b[i];
    return a->request < b->request;
}

static void sift_down(const Tree *trees, Entry *heap, int64_t size, int64_t i) {
    for (;;) {
        int64_t least = i;
        for (int64_t child = 2 * i + 1; child <= 2 * i + 2 && child < size; child++)
            if (comes_before(trees, &heap[child], &heap[least])) least = child;
        if (least == i) return;
        Entry swapped = heap[i];
        heap[i] = heap[least];
        heap[least] = swapped;
        i = least;
    }
}

static void push(const Tree *trees, Entry *heap, int64_t *size, Entry entry) {
    int64_t i = (*size)++;
    heap[i] = entry;
    while (i > 0 && comes_before(trees, &heap[i], &heap[(i - 1) / 2])) {
        Entry swapped = heap[i];
        heap[i] = heap[(i - 1) / 2];
        heap[(i - 1) / 2] = swapped;
        i = (i - 1) / 2;
    }
}

static void pop(const Tree *trees, Entry *heap, int64_t *size) {
    heap[0] = heap[--(*size)];
    sift_down(trees, heap, *size, 0);
}

/* Ranks of a row, best first; of equals the lower. */
static const int16_t *ordered_row(Tree *tree, int64_t row) {
    int64_t width = tree->table->width;
    int16_t *order = tree->order + row * width;
    if (tree->ordered[row]) return order;
    const int32_t *scores = tree->table->scores + row * width;
    for (int64_t i = 0; i < width; i++) {
        int64_t place = i;
        for (; place > 0 && scores[order[place - 1]] < scores[i]; place--) order[place] = order[place - 1];
        order[place] = (int16_t)i;
    }
    tree->ordered[row] = 1;
    return order;
}

/* The first child of a node, or of the root, as an entry. */
static Entry first_child(Tree *tree, int32_t request, int32_t depth, int32_t rank, int32_t node, int64_t score) {
    const Table *table = tree->table;
    int64_t row = depth * table->num_parents + (depth > 0 && table->num_parents > 1 ? rank : 0);
    int16_t best = ordered_row(tree, row)[0];
    Entry entry = {-(score + table->scores[row * table->width + best]), score, depth + 1, request, best, 0, node,
                   (int32_t)row};
    return entry;
}

/* Counts a node; 0 when no further one, each worth no more, could make the rate better. */
static int pays_on(Price *price, int32_t request, int64_t score) {
    int64_t loss = -(score < 0 ? score : 0) >> VALUE_SHIFT;
    int64_t value = price->values[loss < price->last_value ? loss : price->last_value];
    price->taken[price->num_taken++] = request;
    price->value += value;
    int64_t num = price->num_taken;
    if ((__int128)price->value * price->best_cost > (__int128)price->best_value * price->costs[num]) {
        price->best_value = price->value;
        price->best_cost = price->costs[num];
        price->num_best = num;
    } else if (num % LOOK_EVERY == 0 || num - price->num_best == 4) {
        for (int64_t i = num + 1; i < price->num_costs; i++)
            if ((__int128)(price->value + (i - num) * value) * price->best_cost >
                (__int128)price->best_value * price->costs[i])
                return 1;
        return 0;
    }
    return 1;
}

static void grow(Tree *trees, int64_t num_requests, int64_t num_left, Price *price, Entry *heap) {
    int64_t size = 0;
    for (int64_t r = 0; r < num_requests; r++)
        if (trees[r].num_left > 0)
            push(trees, heap, &size, first_child(&trees[r], (int32_t)r, 0, 0, 0, trees[r].table->bias));
    while (size > 0 && num_left > 0) {
        Entry top = heap[0];
        Tree *tree = &trees[top.request];
        const Table *table = tree->table;
        if (tree->num_left == 0) {
            pop(trees, heap, &size);
            continue;
        }
        int64_t node = tree->num_nodes++;
        tree->token_ids[node] = table->ids[(top.depth - 1) * table->width + top.rank];
        tree->parents[node] = top.parent;
        tree->depths[node] = top.depth;
        tree->scores[node] = -top.negated - table->bias;
        tree->ranks[node] = (int16_t)top.rank;
        tree->num_left--;
        num_left--;
        if (price && !pays_on(price, top.request, -top.negated)) break;
        if (top.place + 1 < table->width) {
            int16_t rank = ordered_row(tree, top.row)[top.place + 1];
            heap[0].place++;
            heap[0].rank = rank;
            heap[0].negated = -(top.parent_score + table->scores[top.row * table->width + rank]);
            sift_down(trees, heap, size, 0);
        } else {
            pop(trees, heap, &size);
        }
        if (top.depth < table->max_depth && top.depth < table->num_depths)
            push(trees, heap, &size,
                 first_child(tree, top.request, top.depth, top.rank, (int32_t)node, -top.negated));
    }
}

/* Trees of all requests. `out` is [4, num_requests, room]: token ids, parents, depths and scores of nodes behind the
 * root, whose places are left as they are; `num_nodes` is what each tree has in the end. `costs` [num_costs] begins
 * where all trees are bare roots; NULL is no price. Returns 0, or 1 where there is no memory. */
int grow_trees(const Table *tables, int64_t num_requests, int64_t num_left, const int64_t *costs, int64_t num_costs,
               const int64_t *values, int64_t num_values, int64_t *out, int64_t room, int64_t *num_nodes) {
    int64_t num_rows = 0, num_ranks = 0, num_all = 0;
    for (int64_t r = 0; r < num_requests; r++) {
        int64_t rows = tables[r].scores ? tables[r].num_depths * tables[r].num_parents : 0;
        num_rows += rows;
        num_ranks += rows * tables[r].width;
        num_all += tables[r].num_left + 1;
    }
    /* Every node that is taken adds one entry at most. */
    size_t sizes[] = {num_requests * sizeof(Tree), (num_requests + num_all) * sizeof(Entry),
                      num_all * sizeof(int32_t), (num_ranks + num_all) * sizeof(int16_t), (size_t)num_rows};
    size_t total = 0;
    for (int i = 0; i < 5; i++) total += sizes[i] = (sizes[i] + 15) & ~(size_t)15;
    char *memory = malloc(total);
    if (!memory) return 1;
    Tree *trees = (Tree *)memory;
    Entry *heap = (Entry *)(memory + sizes[0]);
    int32_t *taken = (int32_t *)(memory + sizes[0] + sizes[1]);
    int16_t *shorts = (int16_t *)(memory + sizes[0] + sizes[1] + sizes[2]);
    uint8_t *ordered = (uint8_t *)(memory + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    memset(ordered, 0, sizes[4]);
    for (int64_t r = 0; r < num_requests; r++) {
        const Table *table = &tables[r];
        int64_t rows = table->scores ? table->num_depths * table->num_parents : 0, plane = num_requests * room;
        int64_t *nodes = out + r * room;
        Tree tree = {table, shorts, ordered, shorts + rows * table->width, nodes, nodes + plane, nodes + 2 * plane,
                     nodes + 3 * plane, 1, table->scores ? table->num_left : 0};
        trees[r] = tree;
        trees[r].ranks[0] = 0;
        shorts += rows * table->width + table->num_left + 1;
        ordered += rows;
    }
    Price price = {costs, values, num_costs, num_values - 1, taken, 0, num_requests * VALUE_UNIT,
                   num_requests * VALUE_UNIT, costs ? costs[0] : 0, 0};
    grow(trees, num_requests, num_left, costs ? &price : 0, heap);
    if (costs)
        for (int64_t i = price.num_best; i < price.num_taken; i++) trees[taken[i]].num_nodes--;
    for (int64_t r = 0; r < num_requests; r++) num_nodes[r] = trees[r].num_nodes;
    free(memory);
    return 0;
}

/* Scores [num_depths, per_depth] through the map of each depth, the last of `num_maps` for all deeper ones. `maps`
 * [num_maps, num_knots] are those of one kind of requests; see jetflow_cluster.engine.value_model.apply_maps. */
void map_scores(const int32_t *scores, int64_t num_depths, int64_t per_depth, const int32_t *maps, int64_t num_maps,
                int64_t num_knots, int64_t knot_shift, int64_t worst, int32_t *out) {
    int32_t last = (int32_t)num_knots - 2, width = (int32_t)1 << knot_shift;
    for (int64_t depth = 0; depth < num_depths; depth++) {
        const int32_t *map = maps + (depth < num_maps ? depth : num_maps - 1) * num_knots;
        for (int64_t i = depth * per_depth; i < (depth + 1) * per_depth; i++) {
            int32_t nats = scores[i] < 0 ? -scores[i] : 0, knot = nats >> knot_shift;
            if (knot > last) knot = last;
            int32_t rest = nats - (knot << knot_shift), within = rest < width ? rest : width;
            int64_t slope = (int64_t)map[knot + 1] - map[knot];
            int64_t mapped = map[knot] + (slope * within >> knot_shift) + (rest - within);
            out[i] = (int32_t)-(mapped < 0 ? 0 : mapped > worst ? worst : mapped);
        }
    }
}
