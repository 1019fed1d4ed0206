// A sum of matrix products on tiles.
#include "products.h"

#ifdef LORAFIT_TILES
// Returns 0, or 1 where scratch memory ran out.
KERNEL int sum_products_bf16(const Part* parts, int64_t count, int64_t rows, int64_t columns, bf16* c, int64_t ldc,
                             const bf16* bias, int threads) {
    Job job{parts, count, rows, columns, c, ldc, bias};
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        tiles::configure();
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) fine = share(job, t, threads) && fine;
        tiles::release();
    }
    return fine ? 0 : 1;
}

KERNEL int tiles_permitted() { return tiles::permitted() ? 1 : 0; }
#else
KERNEL int tiles_permitted() { return 0; }
#endif

KERNEL int amx() {
#ifdef LORAFIT_AMX
    return tiles::permitted() ? 1 : 0;
#else
    return 0;
#endif
}
